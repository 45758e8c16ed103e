"""A folder or hub name that transformers knows: its configuration, its weights, and who it is. No code of a checkpoint is ever run.

What a checkpoint lacks is an error that names it, where transformers would put random numbers.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ...store.checked import Part, check, check_memory, read_json
from .family import Family

NO_CODE = dict(trust_remote_code=False)  # said at each call: left out, transformers asks on stdin
EVERYWHERE = r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)$"  # buffers of older versions
PREFIXES = {
    "module.": "saved from DistributedDataParallel",
    "_orig_mod.": "saved from a compiled model",
    "model.": "saved from inside another module",
}
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
REPEATED = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts")  # each a module of Python
MOST_REPEATED = 1024  # some times as many as the largest models have
WEIGHTS = ("model.safetensors", INDICES[0], "pytorch_model.bin", INDICES[1])  # of what is there transformers reads the first
FORMATS = {".gguf": "llama.cpp", ".onnx": "ONNX", ".h5": "TensorFlow", ".msgpack": "Flax", ".pth": "PyTorch alone"}
# Of numbers: safetensors' names and PyTorch's.
KINDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHOWN = 4  # names in a message
OLDEST = 5  # the major version that reads weights as this file relies on


class Index(Part):
    """Which file holds which weight."""

    weight_map: dict[str, str]


def library(name):
    """transformers.  Raises ValueError where it is not installed, or older than what was looked at: it may unpickle weights."""
    try:
        import transformers
    except ImportError:
        raise ValueError(f"--model {name}: public models need transformers: pip install 'tucker-ref[public]'") from None
    if int(transformers.__version__.split(".")[0]) < OLDEST:
        raise ValueError(f"--model {name}: transformers {transformers.__version__} is too old; {OLDEST} or newer is needed")
    return transformers


def config_of(name: str):
    """The configuration, of transformers."""
    return library(name).AutoConfig.from_pretrained(name, **NO_CODE)


def class_of(family: Family, named: str):
    """The class of transformers that opens a model of this architecture, or of a class that was opened before."""
    transformers = library(named)
    named = family.without_head.get(named, named)
    known = named in family.other_heads or named in family.without_head.values()
    return getattr(transformers, named if known else family.head)


def load_weights(name: str, family: Family, config, head: bool) -> nn.Module:
    """The model in single precision, with the weights of its files and no others.

    head: False for a classifier that will be replaced, and may be missing.
    Raises ValueError naming what is missing, what is there beside it, or what has another shape.
    """
    check_indices(name)
    architecture = architecture_of(config)
    of = class_of(family, architecture)
    if not head:
        config.num_labels = 0  # transformers then makes no classifier
    check_size(config, lambda: fresh(of, family, config))
    options = dict(weights_only=True, attn_implementation="sdpa", dtype=torch.float32, ignore_mismatched_sizes=True)
    options |= NO_CODE | {"config": config} if of.__name__ == family.head else family.bare
    model, found = of.from_pretrained(name, output_loading_info=True, **options)
    unused = "|".join((EVERYWHERE, family.unused, *(["classifier\\."] if not head else [])))
    unexpected = [name for name in found["unexpected_keys"] if not re.match(unused, name)]
    check_weights(found["missing_keys"], unexpected, found["mismatched_keys"], architecture)
    check_types(name, model, unused)
    if spoiled := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(f"NaN or infinity is in {_named(spoiled)}")
    return model.eval()


def fresh(of, family: Family, config) -> nn.Module:
    """The architecture that a configuration describes, with random weights; of: as `class_of` gives it."""
    make, more = (of.from_config, NO_CODE) if of.__name__ == family.head else (of._from_config, family.bare)
    if not isinstance(config, getattr(of, "config_class", object)):  # SigLIP's has one for each of its towers
        config = config.vision_config
    return make(config, attn_implementation="sdpa", dtype=torch.float32, **more)


def check_size(config, make: Callable[[], nn.Module]) -> None:
    """Raise ValueError for a configuration of more layers or numbers than a machine takes, before any of them is made."""
    for part in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
        for name in REPEATED:
            count = getattr(part, name, 1)
            if isinstance(count, int) and not 0 <= count <= MOST_REPEATED:
                raise ValueError(f"its {name} is {count:,}; it must be from 0 to {MOST_REPEATED:,}")
    with torch.device("meta"):  # shapes without memory
        needed = sum(parameter.nbytes for parameter in make().parameters())
    check_memory(needed, "a model of its config.json")


def check_weights(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple] = (), saved: str = "") -> None:
    """Raise ValueError, naming them, where weights are missing, have another shape or belong to nothing here.

    saved: the architecture that config.json names.
    """
    missing, unexpected, mismatched = sorted(missing), sorted(unexpected), sorted(mismatched)
    if mismatched:
        name, theirs, ours = mismatched[0]
        raise ValueError(f"{name} has shape {tuple(theirs)} in its file and {tuple(ours)} by its config.json")
    if not (missing or unexpected):
        return
    headless = f" (it is a {saved}, which has no head)" if saved.endswith("Model") else ""
    said = [f"lacks the weights {_named(missing)}{headless}"] if missing else []
    said += [f"holds {_named(unexpected)}, which belong to nothing in this model"] if unexpected else []
    same = (p for p in PREFIXES if unexpected and all(n.startswith(p) and n.removeprefix(p) in missing for n in unexpected))
    prefix = next(same, None)
    remedy = (
        f"; every name begins with {prefix!r} ({PREFIXES[prefix]}): take it off with "
        f"{{name.removeprefix({prefix!r}): w for name, w in weights.items()}} and save them again"
        if prefix
        else ""
    )
    raise ValueError(f"it {' and '.join(said)}{remedy}")


def _named(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def beside(name: str, file: str) -> Path | None:
    """A file of this folder, or of this name on the hub; None where there is none."""
    if os.path.isdir(name):
        return Path(name, file) if Path(name, file).is_file() else None
    found = library(name).utils.cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def check_indices(name: str) -> None:
    """Raise ValueError for weights outside their folder, in none of the files that are read here, or of changes to another model."""
    for index in INDICES:
        if path := beside(name, index):
            weight_map = check(Index, read_json(path.read_text(encoding="utf-8"), index), index).weight_map
            for file in set(weight_map.values()):
                if Path(file).name != file or file in ("", ".."):
                    raise ValueError(f"{index} names {file}, which is outside its folder")
    check_adapter(name)
    if os.path.isdir(name) and not any(beside(name, file) for file in WEIGHTS):
        raise ValueError(f"it holds no model.safetensors and no pytorch_model.bin{_elsewhere(Path(name))}")


def check_adapter(name: str) -> None:
    """Raise ValueError where a folder holds changes to another model."""
    if beside(name, "adapter_config.json"):
        raise ValueError(
            "it holds an adapter (adapter_config.json), changes to another model; merge them and save the whole model"
        )


def check_folder(name: str) -> None:
    """Raise ValueError for a path that is no folder of transformers' making, and say what it holds instead.

    name: as --model takes it; names on the hub pass.
    """
    path = Path(name)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(
            "it is a file; --model takes a folder with config.json and weights, or a .safetensors file written here"
        )
    check_adapter(name)
    if not (path / "config.json").is_file():
        raise ValueError(f"it holds no config.json{_elsewhere(path)}")


def _elsewhere(path: Path) -> str:
    """What a folder holds that is not read here."""
    endings = sorted({file.suffix for file in path.rglob("*") if file.suffix in FORMATS})
    held = " and ".join(f"weights of {FORMATS[ending]} (*{ending})" for ending in endings)
    return f", but {held}, which are not read: save it as transformers does (save_pretrained)" if held else ""


def check_types(name: str, model: nn.Module, unused: str) -> None:
    """Raise ValueError where a file keeps a weight as something else than the numbers it is: integers, quantised numbers.

    Names in a file may differ from the model's, by a prefix or by more. So all that is there counts but buffers, as positions and masks
    are, and what nothing reads.

    Args:
        name: of the folder, or on the hub.
        model: that was opened from it.
        unused: a regular expression of what it may hold beside its weights.
    """
    buffers = [buffer for buffer, _ in model.named_buffers()]
    nobodys = [unused, *(model._keys_to_ignore_on_load_unexpected or ())]
    for path in files_of_weights(name):
        for weight, kind in kinds_in(path).items():
            known = any(buffer.endswith(weight) or weight.endswith(f".{buffer}") for buffer in buffers)
            if kind not in (*KINDS, *KINDS.values()) and not (known or any(re.search(pattern, weight) for pattern in nobodys)):
                raise ValueError(f"{weight} is of type {kind} in its file; open a checkpoint in {', '.join(KINDS)}")


def files_of_weights(name: str) -> list[Path]:
    """The files that transformers reads the weights from."""
    first = next(path for file in WEIGHTS if (path := beside(name, file)))
    if first.name not in INDICES:
        return [first]
    weight_map = check(Index, read_json(first.read_text(encoding="utf-8"), first.name), first.name).weight_map
    return [first.parent / file for file in sorted(set(weight_map.values()))]


def kinds_in(path: Path) -> dict[str, str]:
    """As what each tensor of a file is kept there, by the name that safetensors or PyTorch has for it. No tensor is read."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {weight: file.get_slice(weight).get_dtype() for weight in file.keys()}  # noqa: SIM118  (it is no dict)
    held = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    return {weight: str(tensor.dtype).removeprefix("torch.") for weight, tensor in held.items()}


def architecture_of(config) -> str:
    """The class that config.json names, "" if none.  Raises ValueError for one of the checkpoint's own code."""
    named = config.architectures or [""]
    if not isinstance(named, (str, list)):
        raise ValueError(f"its architectures is {named!r}; it must be a list of names")
    architecture = str(named if isinstance(named, str) else named[0])
    if architecture and not hasattr(library(architecture), architecture):
        raise ValueError(
            f"its architecture is {architecture}, which transformers does not know; code that a checkpoint brings along is never run"
        )
    return architecture


def identity(name: str) -> str:
    """What tells one model from another of the same name, 16 hex digits: a hash of its weights' files and config.json.

    name: a file of weights, a folder of them, or a name on the hub, whose commit says as much.
    """
    path = Path(name)
    if not path.exists():
        return beside(name, "config.json").parent.name[:16]  # in the cache, snapshots/COMMIT/config.json
    files = [path]
    if path.is_dir():
        files = [*sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin")), path / "config.json"]
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def identity_of(model: nn.Module) -> str:
    """The same of a model that came without files."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
