"""Which layers of a model are adapted, and why others are not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter

from gsoft.config import ALL_LINEAR, Config
from gsoft.errors import GSOFTError
from gsoft.linear import RotatedLinear, can_be_put_on


@dataclass(frozen=True)
class Targets:
    """What a configuration means for one model.

    layers: the linear layers to rotate, by their paths. A layer that the model holds in several places has one path.
    skipped: paths of other layers, with the reason.
    saved: modules that are trained as a whole, by their paths.
    unused_names: names in `target_modules` that no layer has.
    skipped_names: names in `target_modules` of which every layer was skipped, with the path of the first.
    """

    layers: dict[str, nn.Linear]
    skipped: dict[str, str]
    saved: dict[str, nn.Module]
    unused_names: tuple[str, ...]
    skipped_names: dict[str, str]

    def __str__(self) -> str:
        """What is adapted and what is not, a line each."""
        lines = [f"adapted: {path} {tuple(layer.weight.shape)}" for path, layer in self.layers.items()]
        lines += [f"trained as a whole: {path}" for path in self.saved]
        lines += [f"skipped: {path}: {reason}" for path, reason in self.skipped.items()]
        lines += [f"no layer is called {name}" for name in self.unused_names]
        return "\n".join(lines)


def find_targets(model: nn.Module, config: Config) -> Targets:
    """The layers that the configuration names.

    model: is looked at, not changed. config: its `target_modules`, `exclude_modules` and `modules_to_save` decide.

    A linear layer that is named but cannot be rotated is an error; with "all-linear" it is skipped. Skipped are also
    other layers that are named, such as convolutions. Raises GSOFTError naming layer and reason, also if nothing is
    found at all or a module to save is missing.
    """
    paths = _paths(model)
    saved = _saved_modules(model, paths, config.modules_to_save)
    tied = _tied_weights({model: [""], **paths})
    wrappers = {path: module for module, places in paths.items() for path in places if _is_wrapper(module)}
    output = _output_layer(model)
    layers: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    found: dict[str, list[str]] = defaultdict(list)  # layers by the name that they go by
    for module, places in paths.items():
        path = places[0]
        names = _matching(config.target_modules, places) if config.target_modules != ALL_LINEAR else {ALL_LINEAR}
        if not names or not _is_a_layer(module):
            continue
        reason = _reason(path, places, module, model, wrappers, tied)
        if config.target_modules == ALL_LINEAR:
            if not _is_linear_to_people(module):
                continue
            if module is output:
                reason = reason or "the model's output layer; name it in target_modules to adapt it"
        for name in names:
            found[name].append(path)
        if _matching(config.exclude_modules, places):
            skipped[path] = "is in exclude_modules"
        elif any(_is_inside(place, root) for place in places for root in saved):
            skipped[path] = "is in modules_to_save"
        elif reason is None:
            assert isinstance(module, nn.Linear)
            layers[path] = module
        elif config.target_modules == ALL_LINEAR or not _is_linear_to_people(module):
            skipped[path] = reason
        else:
            raise GSOFTError(f"{path} {reason}")
    if not layers:
        raise GSOFTError(_nothing_found(model, config, skipped))
    asked = () if isinstance(config.target_modules, str) else config.target_modules
    unused = tuple(name for name in asked if name not in found)
    without = {name: found[name][0] for name in asked if name in found and layers.keys().isdisjoint(found[name])}
    return Targets(layers, skipped, saved, unused, without)


def _paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all paths at which the model holds it, the first one first; not the model itself."""
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        if module is not model:
            paths[module].append(path)
    return dict(paths)


def _matching(patterns: str | Collection[str], places: Sequence[str]) -> set[str]:
    """The names, or the one regular expression, that one of the paths goes by."""
    if isinstance(patterns, str):
        return {patterns} if any(re.fullmatch(patterns, path) for path in places) else set()
    return {name for name in patterns if any(path == name or path.endswith(f".{name}") for path in places)}


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")


def _is_a_layer(module: nn.Module) -> bool:
    """Not a container: it has parameters of its own, or stands in for a layer."""
    return any(True for _ in module.parameters(recurse=False)) or _is_linear_to_people(module)


def _is_wrapper(module: nn.Module) -> bool:
    """Whether this is another adapter's layer: PEFT and others keep the layer that they wrap as `base_layer`."""
    base_layer = getattr(module, "base_layer", None)
    return isinstance(base_layer, nn.Module) and not any(True for _ in base_layer.children())


def _is_linear_to_people(module: nn.Module) -> bool:
    """Whether it is a linear layer, PyTorch's or not, or stands in for one."""
    if isinstance(module, nn.Linear) or _is_wrapper(module) or _is_conv1d(module):
        return True
    is_leaf = not any(True for _ in module.children())
    return is_leaf and "Linear" in type(module).__name__


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers', which is not imported here


def _reason(
    path: str,
    places: Sequence[str],
    module: nn.Module,
    model: nn.Module,
    wrappers: Mapping[str, nn.Module],
    tied: Mapping[nn.Module, str],
) -> str | None:
    """Why the module cannot be rotated, as the end of a sentence that begins with its path; None if it can."""
    kind = f"{type(module).__name__} of {type(module).__module__.partition('.')[0]}"
    if isinstance(module, RotatedLinear):
        return (
            "carries a GSOFT adapter already: remove it first (adapter.remove()), or merge it for good "
            "(adapter.merge_and_unload())"
        )
    for root, wrapper in wrappers.items():
        if any(_is_inside(place, root) for place in places):
            inside = "" if root == path else f" inside of {root},"
            of = f"{type(wrapper).__name__} of {type(wrapper).__module__.partition('.')[0]}"
            return f"is{inside} a layer of another adapter ({of}): merge or remove that adapter first"
    if _is_conv1d(module):
        return f"is a {kind}, which stores its weight transposed: that is not supported, only nn.Linear is"
    if not isinstance(module, nn.Linear):
        return f"is a {kind}: only nn.Linear is rotated"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return "has a weight that is computed (a parametrization or weight norm): remove that first"
    if isinstance(module.weight, UninitializedParameter):
        return "has no shape yet: run the model once before"
    if type(module.weight) is not nn.Parameter:
        return f"is a {kind} whose weight is a {type(module.weight).__name__}: quantised, or spread over devices"
    if not module.weight.is_floating_point():
        return f"is quantised ({kind}): load the model in float32, float16 or bfloat16"
    if type(module) is not nn.Linear and not can_be_put_on(type(module)):
        return f"is a {kind}: a class that cannot be inherited from together with another"
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return f"is a {kind} whose forward is not nn.Linear's: quantised, or changed by another library"
    if any(isinstance(_parent(model, place), nn.MultiheadAttention) for place in places):
        return "belongs to an nn.MultiheadAttention, which uses its weight without calling it"
    if module in tied:
        return f"shares its weight with {tied[module]}: merging would change both; leave it out (exclude_modules)"
    return None


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _tied_weights(paths: Mapping[nn.Module, Sequence[str]]) -> dict[nn.Module, str]:
    """Modules whose `weight` is a parameter of another module as well, or twice of their own, with that one's name."""
    holders: dict[object, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module, places in paths.items():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders[_place_in_memory(parameter)].append((module, f"{places[0]}.{name}".lstrip(".")))
    tied = {}
    for found in holders.values():
        for module, name in found:
            if name.rpartition(".")[2] == "weight" and (others := [other for _, other in found if other != name]):
                tied[module] = others[0]
    return tied


def _place_in_memory(parameter: nn.Parameter) -> object:
    """The same for parameters that share their numbers; the parameter itself where there is no memory to look at."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
        return parameter
    return parameter.data_ptr(), parameter.device


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The output layer of a language model of transformers, which PEFT's "all-linear" leaves out as well."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):  # of models that have none
        return None


def _saved_modules(
    model: nn.Module, paths: Mapping[nn.Module, Sequence[str]], names: Collection[str]
) -> dict[str, nn.Module]:
    """The outermost modules of these names. GSOFTError for a name that no module has, and for shared parameters."""
    found = {places[0]: module for module, places in paths.items() if _matching(names, places)}
    for name in names:
        if not any(_matching([name], places) for places in paths.values()):
            raise GSOFTError(f"modules_to_save: no module is called {name}")
    saved = {
        path: module
        for path, module in found.items()
        if not any(other != path and _is_inside(path, other) for other in found)
    }
    for path, module in saved.items():
        inside = set(module.modules())
        for parameter_name, parameter in module.named_parameters():
            for other in _holders([model, *paths], parameter):
                if other not in inside:
                    raise GSOFTError(
                        f"{path}.{parameter_name} is shared with {paths[other][0] if other in paths else 'the model'}: "
                        "training it would change both; leave it out of modules_to_save"
                    )
    return saved


def _holders(modules: Iterable[nn.Module], parameter: nn.Parameter) -> Iterator[nn.Module]:
    return (module for module in modules if any(own is parameter for own in module.parameters(recurse=False)))


def _nothing_found(model: nn.Module, config: Config, skipped: Mapping[str, str]) -> str:
    if isinstance(model, nn.Linear):
        return "the model itself is an nn.Linear, which has no path: put it into a module, such as nn.Sequential"
    asked = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    there = f"its linear layers: {', '.join(linears[:20])}{', …' if linears[20:] else ''}" if linears else "it has none"
    reasons = "".join(f"; {path} {reason}" for path, reason in list(skipped.items())[:3])
    return f"target_modules {asked} fits no linear layer of {type(model).__name__}{reasons}; {there}"
