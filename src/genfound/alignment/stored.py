"""Features of teachers in a latent store: what its manifest says of them, and whether they are those of a training."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from genfound.alignment.base import TeacherFeatures
from genfound.config import targets
from genfound.config.checks import one_of
from genfound.config.compose import TARGET
from genfound.config.targets import trusted
from genfound.data.latents.manifest import read_manifest
from genfound.data.latents.store import Store
from genfound.data.packing.batch_plan import MicroBatch

Options = Mapping[str, Any]

TEACHERS = "alignment.teachers"
FEATURES = ("auto", "compute", "stored")
"""Where features come from; `auto`: out of the store, where the data are one."""

ENCODE = "give genfound.encode this alignment=... and another out=..., or train on images, or with alignment=none"


@dataclass(frozen=True)
class FeatureReader:
    """Reads what teachers see in the images of a micro-batch from a store; nothing if its step is not aligned."""

    store: Store
    teachers: TeacherFeatures

    def __call__(self, micro: MicroBatch, mirrored: Sequence[bool]) -> list[list[Tensor]] | None:
        """For each image, of each teacher (Z, rows, columns)."""
        if not self.teachers.aligned(micro):
            return None
        pairs = zip(micro.indices, mirrored, strict=True)
        return [self.store.features(index, flip, self.teachers.stored) for index, flip in pairs]


def described(named: Mapping[str, Options], trust: Sequence[str], unit: int, pixels: int | None) -> dict[str, Any]:
    """What a manifest says of teachers.

    Args:
        named: their options, by name.
        trust: packages that their classes may come from.
        unit: pixels of an image per token side, of the grid of the features.
        pixels: of what teachers see, likewise; `None`: as many.
    """
    teachers = {name: {**own, "digest": weights_digest(TEACHERS, own, trust)} for name, own in named.items()}
    return {"token_pixels": unit, "seen_pixels": pixels or unit, "teachers": teachers}


def stored_names(config: Mapping[str, Any], named: Mapping[str, Options]) -> tuple[str, ...]:
    """The names under which the data of a training have the features of its teachers; none where these compute them.

    Raises:
        ValueError: the data have not those that are wanted; the message names the key.
    """
    wanted = one_of("alignment.features", (config.get("alignment") or {}).get("features", "auto"), FEATURES)
    if not named or "model" not in config or wanted == "compute":
        return ()
    root = config["data"].get("root")
    if not issubclass(targets.target("data", config["data"], trusted(config)), Store):
        if wanted == "stored":
            way = "choose data=latent_store with features, or alignment.features=compute"
            raise ValueError(f"alignment.features=stored reads features, and data have none; {way}")
        return ()
    manifest = read_manifest(Path(root))
    if (held := manifest.get("features")) is None:
        raise ValueError(f"alignment: data.root={root} holds no features of teachers; {ENCODE}")
    unit = manifest["tokenizer"]["stride"] * config["model"]["patch_size"]
    asked = {"model.patch_size": ("token_pixels", unit), "alignment.pixels": ("seen_pixels", unit)}
    if config["alignment"]["pixels"]:
        asked["alignment.pixels"] = "seen_pixels", config["alignment"]["pixels"]
    for key, (name, pixels) in asked.items():
        if held[name] != pixels:
            found = f"holds features of {held[name]} pixels per token, and {key} asks for {pixels}"
            raise ValueError(f"{key}: data.root={root} {found}; {ENCODE}")
    return tuple(_name_of(name, own, held["teachers"], root, trusted(config)) for name, own in named.items())


def _name_of(name: str, own: Options, held: Mapping[str, Options], root: str, trust: Sequence[str]) -> str:
    """The name of a teacher in a store."""
    for other, made in held.items():
        if same(TEACHERS, own, made, trust):
            return other
    has = ", ".join(f"{other} ({made.get('weights') or made[TARGET]})" for other, made in held.items())
    raise ValueError(f"alignment.teachers.{name}: data.root={root} holds the features of another one, {has}; {ENCODE}")


def same(group: str, ours: Options, made: Options, trust: Sequence[str]) -> bool:
    """Whether a frozen network is that of a store: names on the hub tell them apart, and so do weights themselves."""
    if {**ours, "weights": None, "digest": None} != {**made, "weights": None, "digest": None}:
        return False
    weights = ours.get("weights")
    if weights == made.get("weights") and not Path(weights or "-").expanduser().exists():
        return True
    try:
        return weights_digest(group, ours, trust) == made["digest"]
    except FileNotFoundError:
        return False


def weights_digest(group: str, options: Options, trust: Sequence[str]) -> str:
    """Of the files of the weights of a teacher or text encoder; the name of weights that are in none."""
    kind = targets.target(group, options, trust)
    weights = options.get("weights")
    path = kind.fetch(weights) if hasattr(kind, "fetch") else None
    if path is None:
        return str(weights or "")
    hashed = hashlib.blake2b(digest_size=16)
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while piece := stream.read(2**24):
                hashed.update(piece)
    return hashed.hexdigest()
