"""What is done with finished runs: figures, comparison, diagnosis, pictures, prediction, export."""
