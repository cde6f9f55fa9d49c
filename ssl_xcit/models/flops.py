"""Parameters of a network, and the FLOPs of an XCiT as tables and as our forward pass count them.

Tables count a multiply-add as one, torch as two.
"""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_xcit.models.xcit import XCiT


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, without BatchNorm's running statistics."""
    return sum(parameter.numel() for parameter in model.parameters())


def table_flops(model: XCiT, side: int) -> int:
    """FLOPs of the backbone for one image of side x side pixels, as papers and tables count them.

        convolution, linear, matrix product   1 per multiply-add (biases are free)
        BatchNorm in evaluation, LayerNorm    2 and 5 per element
        everything else                       free: softmax, GELU, norms of q and k, residuals

    These are the rules of fvcore and mmengine. They reproduce the 42 published numbers exactly,
    with class attention as usually written, which projects every token to a key and a value. Our
    implementation projects the query instead, and its last block computes only the cls token.
    """
    total, d, norm = 0, model.embed_dim, 5 * model.embed_dim  # LayerNorm of a token
    for layer in model.patch_embed.proj:
        if isinstance(layer, nn.Sequential):  # convolution and BatchNorm, else GELU
            side //= 2
            total += side**2 * (_weights(layer) + 2 * layer[1].num_features)
    n = side**2  # patch tokens
    total += n * _weights(model.pos_embeder)
    for block in model.blocks:
        products = 2 * d * (d // block.attn.num_heads)  # q^T k, and attention times v
        total += n * (_weights(block) + products + 2 * d + 3 * norm)  # 2 d: LPI's BatchNorm
    for block in model.cls_attn_blocks:
        keys_and_values, products = 2 * n * d * d, 2 * (n + 1) * d  # of the patches; of all tokens
        normalised = n + 1 + (n + 1 if block.tokens_norm else 1)
        total += _weights(block) + keys_and_values + products + normalised * norm
    return total + (n + 1) * norm


def forward_flops(model: nn.Module, *inputs: object) -> dict[str, int]:
    """FLOPs of a forward pass in evaluation by module ("XCiT.pos_embeder"), in all by "Global".

    Only shapes are computed, so `inputs` lie on the meta device; the model may lie anywhere.
    """
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(model, state, inputs)
    return {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}


def _weights(module: nn.Module) -> int:
    """Weights of linear layers and convolutions: multiply-adds per token, or per output pixel."""
    layers = (part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear))
    return sum(layer.weight.numel() for layer in layers)
