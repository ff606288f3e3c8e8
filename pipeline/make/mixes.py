"""From a budget to a mix: how many bytes it leaves, which types they buy, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtool import QtoolError
from qtool.convert.files.chosen import Chosen
from qtool.convert.formats.format import Format, ModelFiles
from qtool.convert.formats.plan import ModelShape, OutputPlan
from qtool.quantize import allocation
from qtool.quantize.allocation import Choice, Offers
from qtool.quantize.methods.budget import Budget
from qtool.quantize.methods.method import Method
from qtool.quantize.survey import require_measurable
from qtool.sizing.room import room

Sizes = Mapping[str, Mapping[str, int]]
"""Module -> type -> bytes."""
BY_KL = 8.5  # bits a weight that are foreseen where only a divergence is asked for


def foreseen(method: Method, budget: Budget, shape: ModelShape, files: ModelFiles | None) -> dict[str, str]:
    """A mix within ``budget`` as if all weights counted alike: an error falls to a quarter with every bit. ``files``:
    of the source; None: of a header only what no vocabulary is counts. Raises QtoolError for a budget that no mix of
    this model keeps, and for a model whose costs cannot be measured."""
    require_measurable(shape.decoder.shape)
    sizes = method.offers(shape)
    weights = {module: max(own.values()) for module, own in sizes.items()}
    even: Offers = {
        module: [
            Choice(kind, size, weights[module] * 4.0 ** (-16 * size / weights[module])) for kind, size in own.items()
        ]
        for module, own in sizes.items()
    }
    start = planned(method, sizes, shape)
    beside = beside_of(start, sizes)
    header = header_of(budget, method.container.of_model(shape.decoder), start, files)
    limit = limit_of(budget, start, shape, str(method.container.section["quant_method"]), header)
    if limit is None:
        limit = max(int(BY_KL * start.parameters / 8), beside + allocation.bounds(even)[0])
    return within(budget, even, limit, beside, start.parameters, method.alike(shape))


def planned(method: Method, sizes: Sizes, shape: ModelShape) -> OutputPlan:
    """With the smallest type of every matrix."""
    least = {module: min(own, key=lambda kind: own[kind]) for module, own in sizes.items()}
    return method.decided(least).container.of_model(shape.decoder).plan(shape)


def beside_of(smallest: OutputPlan, sizes: Sizes) -> int:
    """Bytes of the tensors that have no choice. ``smallest``: a plan with the smallest type of every matrix."""
    return smallest.nbytes - sum(min(own.values()) for own in sizes.values())


def header_of(budget: Budget, container: Format, plan: OutputPlan, files: ModelFiles | None) -> int:
    """Bytes of the file's header, where the budget counts them. ``files``: of the source, for a header that holds its
    vocabulary; None: such a header is left out."""
    if budget.max_bytes is None:
        return 0
    if files is not None:
        return container.header_bytes(plan, files)
    whole = container.file_bytes(plan)
    return 0 if whole is None else whole - plan.nbytes


def limit_of(budget: Budget, smallest: OutputPlan, shape: ModelShape, family: str, header: int = 0) -> int | None:
    """Bytes that all tensors may take; None where a divergence is asked for. ``family``: of the container; ``header``:
    of the file, beside them."""
    if budget.target_bpw is not None:
        return int(budget.target_bpw * smallest.parameters / 8)
    if budget.max_bytes is not None:
        return budget.max_bytes - header
    return None if budget.fits is None else room(shape, smallest.nbytes, budget.fits, family)


Groups = Sequence[Sequence[str]]
"""Of modules that must get one type."""


def joined(offers: Offers, alike: Groups) -> Offers:
    """The choices of each group under its first module, and of every free module."""
    groups = {group[0]: group for group in ([one for one in own if one in offers] for own in alike) if group}
    members = {module for group in groups.values() for module in group}
    return {
        module: allocation.together([offers[one] for one in groups[module]]) if module in groups else own
        for module, own in offers.items()
        if module in groups or module not in members
    }


def apart(mix: allocation.Mix, offers: Offers, alike: Groups) -> dict[str, str]:
    """Module -> type, from what `joined` offers became."""
    leaders = {module: own[0] for own in ([one for one in group if one in offers] for group in alike) for module in own}
    return {module: mix[leaders.get(module, module)].type for module in offers}


def within(
    budget: Budget, offers: Offers, limit: int, beside: int, parameters: int, alike: Groups = ()
) -> dict[str, str]:
    """Module -> type, all tensors within ``limit`` bytes. Raises QtoolError naming the nearest budget that works."""
    mix = allocation.cheapest(joined(offers, alike), limit - beside)
    if mix is None:
        raise _too_small(budget, limit, beside + allocation.bounds(offers)[0], parameters)
    return apart(mix, offers, alike)


def _too_small(budget: Budget, limit: int, least: int, parameters: int) -> QtoolError:
    short = least - limit
    return QtoolError(
        f"budget: {budget} is too small: with the smallest type of every matrix this model takes {_size(least)} "
        f"({8 * least / parameters:.3f} bits a weight), {_size(short)} more than that leaves. The nearest that "
        f"works: {_nearest(budget, short, least, parameters)}."
    )


def keeping(budget: Budget, offers: Offers, factor: float, alike: Groups = ()) -> dict[str, str]:
    """The smallest mix whose expected divergence, times ``factor``, is at most `max_kld`. Raises QtoolError."""
    assert budget.max_kld is not None
    mix = allocation.smallest(joined(offers, alike), budget.max_kld / factor)
    if mix is None:
        best = sum(min(choice.cost for choice in own) for own in offers.values()) * factor
        raise QtoolError(f"budget: {budget} is less than any mix keeps; the nearest that works: max_kld {best:.2g}.")
    return apart(mix, offers, alike)


def offers_of(sizes: Sizes, costs: Mapping[str, Mapping[str, float]]) -> Offers:
    """Choices of every module."""
    return {
        module: [Choice(kind, size, costs[module][kind]) for kind, size in own.items()] for module, own in sizes.items()
    }


def more(chosen: Chosen, step: int | None = None) -> str:
    """What further bytes would buy: a GB, or of a small file a twentieth of it; where that buys nothing, as of a model
    of few matrices, the next larger mix that is worth it."""
    offers = offers_of(chosen.sizes, chosen.costs)
    free, spent = joined(offers, chosen.alike), chosen.nbytes - chosen.beside
    step = step or min(10**9, max(1, chosen.nbytes // 20))
    found = allocation.cheapest(free, spent + step)
    if found is not None and allocation.size_of(found) <= spent:
        larger = [size for size, _ in allocation.curve(free) if size > spent + step]
        step = larger[0] - spent if larger else step
        found = allocation.cheapest(free, spent + step)
    assert found is not None
    types = apart(found, offers, chosen.alike)
    mix = {module: next(one for one in offers[module] if one.type == kind) for module, kind in types.items()}
    moved = [module for module, choice in mix.items() if choice.nbytes > chosen.sizes[module][chosen.mix[module]]]
    if not moved:
        return "nothing more is gained by a larger file"
    gains = {module: chosen.costs[module][chosen.mix[module]] - mix[module].cost for module in moved}
    most = max(moved, key=lambda module: (gains[module], module))
    expected = allocation.cost_of(mix)
    return (
        f"{_size(step)} more would buy: expected KL {expected:.2g} for {chosen.expected:.2g}, by larger types for "
        f"{len(moved)} of {len(mix)} matrices ({most} first, {chosen.mix[most]} -> {mix[most].type})"
    )


def _nearest(budget: Budget, short: int, least: int, parameters: int) -> str:
    if budget.target_bpw is not None:
        bits = 8 * least / parameters
        return f"target_bpw {int(bits * 1000 + 1) / 1000}"
    if budget.max_bytes is not None:
        return f"max_size {-(-(budget.max_bytes + short) // 10**4) / 100} MB"
    return f"a card with {_size(short)} more, a shorter context or fewer users"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.3f} MB"
