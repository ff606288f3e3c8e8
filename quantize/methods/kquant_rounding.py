"""ggml's block types by descent: what a file stores of each block, chosen so that errors make up for each other.

A super-block of 256 columns holds sub-blocks, whose weights are ``d * step * code - dmin * minimum``: float16 d and
dmin, small integers step and minimum, codes of four to six bits. Types without super-blocks have a float16 scale (and
minimum) for 32 columns. Both are an affine grid whose two numbers come from a set: multiples of d and dmin, or float16.

As in ../descent.py: one pass from left to right, in which the columns behind take up what a sub-block loses; then
sweeps over all sub-blocks, each with all others known. At a sub-block several pairs of scale and shift are tried, each
with codes by coordinate descent: what it has, the least-squares pair for its codes and its neighbours, and ranges of
the weights that it should have. After its sub-blocks a super-block gets the d and dmin that fit all of them best.
As there, every function takes one problem or a stack of E with a leading axis on all tensors: experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qtool.convert.formats.gguf.ggml import GgmlBlocks
from qtool.quantize.methods.ggml import quantize_ggml
from qtool.quantize.methods.kquant_blocks import KINDS, VISIT, ChosenBlocks, of_blocks
from qtool.quantize.methods.kquant_columns import BlockColumns
from qtool.quantize.methods.kquant_refit import refit
from qtool.quantize.methods.kquant_visits import choose, revisit
from qtool.quantize.precision import each_product, subtract_product, tensor_float32
from qtool.quantize.rounding import Factor, invert_upper

SWEEPS = 3
WHOLE_ROWS = ("Q5_0", "Q5_1")  # whose blocks ggml weighs by the mean square of the whole row


def quantize(target: Tensor, factor: Factor, gram: Tensor, type_name: str) -> GgmlBlocks:
    """``target`` float32 ``[out, in]`` in blocks that lose less on inputs of the damped Gram matrix ``gram [in, in]``,
    row by row, than those that ggml finds with its diagonal; of a stack the rows of one problem below the other's, and
    so of pieces of one matrix, ``[pieces, out, in]``. ``factor``: of the same matrix. A float type has none."""
    if target.ndim > gram.ndim and not target.is_cuda:
        found = [quantize(one, factor, gram, type_name) for one in target]
        data = torch.cat([blocks.data for blocks in found])
        return GgmlBlocks(data, type_name, (len(data), target.shape[-1]))
    plain = _search(target, type_name, gram.diagonal(dim1=-2, dim2=-1))
    if type_name not in KINDS:
        return plain
    blocks = descend(target, begin(target, factor, type_name), gram, SWEEPS).blocks(type_name)
    worse = _row_loss(blocks, target, gram) > _row_loss(plain, target, gram)
    return GgmlBlocks(torch.where(worse, plain.data, blocks.data), type_name, blocks.shape)


def _row_loss(blocks: GgmlBlocks, target: Tensor, gram: Tensor) -> Tensor:
    """``[rows of all problems, 1]``."""
    error = blocks.dequantize().view_as(target).sub_(target)
    if error.ndim > gram.ndim:
        return torch.cat([((one @ gram) * one).sum(-1) for one in error]).view(-1, 1)
    return ((error @ gram) * error).sum(-1).view(-1, 1)


def _search(weights: Tensor, type_name: str, importance: Tensor) -> GgmlBlocks:
    """ggml's own blocks for ``[out, in]``, columns weighed by ``importance [in]``; of a stack, or of pieces, all rows
    together."""
    importance = importance / importance.mean(-1, keepdim=True)
    if importance.ndim == 1:
        return quantize_ggml(weights.flatten(0, -2), type_name, importance)
    problems, out, columns = weights.shape
    if type_name in WHOLE_ROWS:
        found = [quantize_ggml(*one) for one in zip(weights, [type_name] * problems, importance, strict=True)]
        data = torch.cat([blocks.data for blocks in found])
    else:  # a block does not know what lies beside it in a row: the problems side by side in one launch
        wide = quantize_ggml(weights.transpose(0, 1).reshape(out, -1), type_name, importance.flatten())
        data = wide.data.view(out, problems, -1).transpose(0, 1).reshape(problems * out, -1)
    return GgmlBlocks(data, type_name, (problems * out, columns))


def workspace(out: int, columns: int) -> int:
    """Float32 numbers that `quantize` takes at most: what is wanted, codes before and after, the error and a product;
    a visit's columns, and the candidates of a sub-block."""
    return 9 * out * columns // 2 + 4 * out * VISIT


def begin(target: Tensor, factor: Factor, type_name: str) -> ChosenBlocks:
    """One pass from left to right. ``target`` float32 ``[out, in]``, unchanged; ``factor``: of the damped Gram matrix,
    in the columns' order. d and dmin are those that ggml finds for the weights wanted, importance being what an error
    costs after the columns behind did their best."""
    kind, weight = KINDS[type_name], target.mT.clone(memory_format=torch.contiguous_format)
    chosen = BlockColumns.empty(kind, weight)
    for visit in _visits(weight.shape[-2]):
        part, aims, upper = chosen.part(visit), weight[..., visit, :], factor.upper[..., visit, visit]
        inverse = invert_upper(upper)
        _start(part, aims, inverse, type_name)
        choose(part, aims, upper, inverse)
        error = each_product(inverse.mT, part.weights().neg_().add_(aims))
        subtract_product(weight[..., visit.stop :, :], factor.upper[..., visit, visit.stop :].mT, error)
    return chosen.rows()


def descend(target: Tensor, chosen: ChosenBlocks, gram: Tensor, sweeps: int = SWEEPS) -> ChosenBlocks:
    """Come back to each sub-block ``sweeps`` times, all others held; never a higher loss than before. ``gram [in,
    in]``: symmetric and positive definite."""
    kind, found = chosen.kind, BlockColumns.of(chosen)
    error = found.weights().sub_(target.mT)
    for _ in range(sweeps):
        for visit in _visits(target.shape[-1]):
            part, metric = found.part(visit), gram[..., visit, visit].contiguous()
            with tensor_float32():
                slope = each_product(gram[..., visit, :], error)
            before = part.weights()
            revisit(part, slope, metric)
            if kind.steps is not None:
                refit(part, slope, metric)
            error[..., visit, :] += part.weights().sub_(before)
    return found.rows()


def _visits(columns: int) -> Iterator[slice]:
    return (slice(start, min(start + VISIT, columns)) for start in range(0, columns, VISIT))


def _start(part: BlockColumns, aims: Tensor, inverse: Tensor, type_name: str) -> None:
    """ggml's own blocks for the weights ``aims [width, out]``; ``inverse``: of the visit's block of the factor."""
    importance = inverse.square().sum(-1)  # the diagonal of inverse @ inverse.mT, as in rounding.residual_metric
    found = of_blocks(_search(aims.mT.contiguous(), type_name, importance))
    *problems, _, out = aims.shape
    codes, scale, shift, d, dmin = (one.view(*problems, out, -1).mT for one in found.numbers)
    part.codes.copy_(codes)
    part.scale.copy_(scale)
    part.shift.copy_(shift)
    if part.kind.steps is not None:
        part.d.copy_(d)
        part.dmin.copy_(dmin)
