"""The ground floor: configs, errors, safe files, metrics and averages. Imports no other folder."""
