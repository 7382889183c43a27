"""From a resolved configuration to its text encoder."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from genfound.alignment.stored import same
from genfound.config import targets
from genfound.config.targets import instantiate, trusted
from genfound.data.images.base import Captioned, ImageSource, LatentSource
from genfound.data.latents.store import Store
from genfound.text.base import TextEncoder

Config = Mapping[str, Any]

ENCODE = "give genfound.encode this text_encoder=... and another out=..., or train on images with captions"


def text_options(config: Config) -> dict[str, Any]:
    """The options of the text encoder, none in a run of classes."""
    return dict(config.get("text_encoder") or {})


def check_captions(config: Config, images: ImageSource) -> None:
    """Raise a ValueError for images without captions that a model of text is to learn from, and the other way round."""
    options = text_options(config)
    if not options:
        if not images.class_names:
            way = "choose a model of text, such as model=nit_t2i_xl, and text_encoder=gemma3_1b"
            raise ValueError(f"data have captions and no classes; {way}")
        return
    if isinstance(images, Store):
        if images.encoder is None:
            raise ValueError(f"data.root={images.root} holds no captions; {ENCODE}")
        if not same("text_encoder", options, images.encoder, trusted(config)):
            changed = [key for key, value in images.encoder.items() if options.get(key, value) != value]
            told = ", ".join(f"{key}={images.encoder[key]}" for key in changed or ["digest"])
            raise ValueError(f"text_encoder: data.root={images.root} holds the text of another one ({told}); {ENCODE}")
    elif not isinstance(images, Captioned):
        way = "choose data=captions, a store of genfound.encode with text_encoder=..., or a model of classes"
        raise ValueError(f"data have no captions, which this model reads; {way}")


def reader_of_text(images: ImageSource) -> Callable[[int], Any]:
    """What reads the caption of an image, or what was made of it where that is stored."""
    return images.text if isinstance(images, Store) else cast(Captioned, images).caption


def text_encoder(config: Config) -> TextEncoder | None:
    """The text encoder of a configuration, if it has one; the same one when it is asked for again."""
    options = text_options(config)
    return _loaded(json.dumps(options, sort_keys=True), tuple(trusted(config))) if options else None


@functools.lru_cache(maxsize=1)
def _loaded(options: str, trust: Sequence[str]) -> TextEncoder:
    built: TextEncoder = instantiate("text_encoder", json.loads(options), trust)
    return built


def fetch_text_encoder(config: Config, download: bool = True) -> Path | None:
    """Where its weights are, downloaded if they are not at hand; `None` if it needs none, or there is none.

    Commands call this before they start processes, which never download.
    """
    options = text_options(config)
    if not options:
        return None
    kind: type[TextEncoder] = targets.target("text_encoder", options, trusted(config))
    return kind.fetch(options.get("weights"), download)


def fetch_for_training(config: Config) -> None:
    """`fetch_text_encoder`, unless the data hold what it makes of captions and no samples are drawn."""
    kind = targets.target("data", config["data"], trusted(config))
    if draws_samples(config) or LatentSource not in getattr(kind, "__mro__", ()):
        fetch_text_encoder(config)


def draws_samples(config: Config) -> bool:
    """Whether a training does, for previews or evaluations."""
    return any((config["callbacks"].get(name) or {}).get("every") for name in ("preview", "evaluation"))
