"""Vision transformers: torchvision's, at any image size, and the networks of DINOv2."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import StochasticDepth

from models.layers import LAYERS, Backbone, enlarge, is_known

OFFSET = 0.1  # patches; DINOv2 interpolates its positions as if the map were so much larger


class LayerScale(StochasticDepth):
    """x * gamma, a factor per channel, at the end of a residual branch; then drop path.

    Touvron et al. 2021, arXiv:2103.17239.
    """

    def __init__(self, width: int):
        super().__init__(0.0, "row")
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.gamma)


class SelfAttention(nn.MultiheadAttention):
    """torch's module, with a forward in place of its many cases that torch.export can follow."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, batch_first=True)

    def forward(self, x: torch.Tensor, *_, need_weights: bool = False) -> tuple[torch.Tensor, None]:
        """(N, T, D) -> ((N, T, D), None), called as torch's: with x three times."""
        joined = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = joined.unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        if x.is_cuda and torch.are_deterministic_algorithms_enabled():
            # The gradients of the fused kernels depend on the order of the threads.
            shares = (q @ k.transpose(2, 3) / self.head_dim**0.5).softmax(-1)
            mixed = shares.to(v.dtype) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


class ViT(Backbone):
    """Patches and a class token, and blocks of self-attention; all maps have the patches' stride.

    layer1 to layer4 are the patch tokens after each quarter of the blocks, those of layer4 after
    the last layer norm; `pooled` is the class token after it. Position embeddings are interpolated
    to the size of the image, as DINOv2 does.

    Args:
        network: of torchvision; it keeps its names.
        pools: see `Backbone`.
        layer_scale: give every residual branch a `LayerScale`, as DINOv2 does.
    """

    left_out = ("heads.",)
    pools_layer4 = False

    def __init__(self, network: VisionTransformer, pools: bool, layer_scale: bool = False):
        super().__init__(pools)
        self.multiple = network.patch_size
        self.probe = 4 * network.patch_size
        self.conv_proj = network.conv_proj
        self.class_token = network.class_token
        self.encoder = network.encoder
        self.grid = network.image_size // network.patch_size
        width = network.hidden_dim
        for block in self.encoder.layers:  # drop path is where torchvision has a dropout
            block.self_attention = SelfAttention(width, block.num_heads)
            block.dropout = LayerScale(width) if layer_scale else StochasticDepth(0.0, "row")
            block.mlp[4] = LayerScale(width) if layer_scale else StochasticDepth(0.0, "row")

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.conv_proj(enlarge(x, self.multiple))
        size = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        positions = self.encoder.pos_embedding
        tokens = tokens + self._interpolated(positions[:, 1:], *size)
        first = (self.class_token + positions[:, :1]).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([first, tokens], dim=1)
        features, quarter = {}, len(self.encoder.layers) // 4
        for number, block in enumerate(self.encoder.layers, 1):
            tokens = block(tokens)
            if number == len(self.encoder.layers):
                tokens = self.encoder.ln(tokens)
            if number % quarter == 0:
                patches = tokens[:, 1:].transpose(1, 2).unflatten(2, size)
                features[LAYERS[number // quarter - 1]] = patches
                # All gradients of the patches pass through the map.
                patches = patches.flatten(2).transpose(1, 2)
                tokens = torch.cat([tokens[:, :1], patches], dim=1)
        if self.pools:
            features["pooled"] = tokens[:, 0]
        return features

    def _interpolated(self, positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Position embeddings (1, grid * grid, D) of a map of another size: (1, H * W, D)."""
        if is_known(height, width) and (height, width) == (self.grid, self.grid):
            return positions
        sides = [torch.full((), side, device=positions.device) for side in (height, width)]
        same = (sides[0] == self.grid) & (sides[1] == self.grid)
        offset = torch.where(same, 0.0, OFFSET)
        rows, columns = (bicubic_weights(self.grid, n, offset) for n in (height, width))
        # Autocast leaves float64 alone.
        squares = positions.transpose(1, 2).unflatten(2, (self.grid, self.grid)).double()
        resized = rows @ (squares @ columns.T)
        return resized.flatten(2).transpose(1, 2).to(positions.dtype)

    def stages(self) -> dict[str, list[nn.Module]]:
        blocks = list(self.encoder.layers)
        quarter = len(blocks) // 4
        stages = {name: blocks[i * quarter :][:quarter] for i, name in enumerate(LAYERS)}
        embedding = nn.ParameterList([self.class_token, self.encoder.pos_embedding])
        stages["layer1"] = [self.conv_proj, embedding, *stages["layer1"]]
        stages["layer4"].append(self.encoder.ln)
        return stages


def bicubic_weights(old: int, new: int, offset: torch.Tensor) -> torch.Tensor:
    """How much each of `old` positions counts for each of `new` ones: float64 (new, old).

    The kernel is torch's (a = -0.75), the distance of positions old / (new + offset), where
    `offset` is a number (). As a product with a matrix the gradient does not depend on the order of
    the threads of a GPU.
    """
    steps = torch.arange(new, device=offset.device, dtype=torch.float64)
    centers = (steps + 0.5) * (old / (new + offset.double())) - 0.5
    taps = centers.floor()[:, None] + torch.arange(-1, 3, device=offset.device)
    distance = (centers[:, None] - taps).abs()
    near = (1.25 * distance - 2.25) * distance**2 + 1
    far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
    kernel = torch.where(distance <= 1, near, far)
    places = F.one_hot(taps.clamp(0, old - 1).long(), old)
    return (kernel[:, :, None] * places).sum(1)


def build_vit(
    image_size: int, patch: int, depth: int, heads: int, width: int, pools: bool, dinov2: bool
) -> ViT:
    """A vision transformer with random weights.

    Args:
        image_size: px of the square that the position embeddings are made for.
        patch: px of a patch.
        depth: number of blocks.
        heads: of self-attention.
        width: D.
        pools: see `Backbone`.
        dinov2: whether residual branches have a `LayerScale`.
    """
    network = VisionTransformer(image_size, patch, depth, heads, width, 4 * width)
    return ViT(network, pools, layer_scale=dinov2)
