"""Training on latents that were encoded before: which tokenizer made them, and how they are normalised.

Nothing here loads the weights of an autoencoder. Only decoding does, for the pictures of a run.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from genfound.config.targets import target
from genfound.data.latents.manifest import read_manifest
from genfound.data.latents.nit import NiTLatents
from genfound.data.latents.store import Store
from genfound.tokenizers import LatentSpec, Tokenizer
from genfound.tokenizers.autoencoder import Autoencoder
from genfound.tokenizers.sd_vae import drawn
from genfound.tokenizers.weights import latent_spec, locate, read_config, scaling, tensors

RANDOM = ("random", "random_tiny")

DECODER_KEYS = ("decoder.", "post_quant_conv.", "quantize.")
"""Weights that leave latents as they are: autoencoders that differ in these alone share a store."""

Options = Mapping[str, Any]


class TokenizerInfo(NamedTuple):
    """What is known of a tokenizer without its weights."""

    name: str  # of the file of its class, e.g. `dc_ae`
    weights: str  # as the configuration names them; empty where it has none
    folder: Path | None  # where they lie, or LDM's file; `None` where it has none, or they are not to be had
    spec: LatentSpec
    scale: float | Tensor  # latent = (mean - shift) * scale, numbers or (C, 1, 1)
    shift: float | Tensor
    stochastic: bool  # training draws from the posterior

    @property
    def absent(self) -> bool:
        """Its weights are not to be had, so that scale and shift are the published ones."""
        return self.folder is None and self.weights not in ("", *RANDOM)


class StoredTokenizer:
    """The tokenizer of moments that are stored: means, or means and log-variances."""

    online = False

    def __init__(self, described: TokenizerInfo, has_variance: bool, load: Callable[[], Tokenizer]) -> None:
        self.described = described
        self.spec = described.spec
        self.has_variance = has_variance
        self.stochastic = described.stochastic and has_variance
        self._load = load
        self._decodes = True

    def normalise(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, C, h, w), or (B, 2 C, h, w) with log-variance -> (B, C, h, w), drawn with the noise or the mean."""
        latents = drawn(moments, noise) if self.has_variance else moments
        return (latents - self.described.shift) * self.described.scale

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """As the tokenizer itself."""
        return self._tokenizer.encode(images, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """As the tokenizer itself; where its weights are not to be had, three channels, +-2 as white and black."""
        if self._decodes:
            try:
                return self._tokenizer.decode(latents)
            except (FileNotFoundError, ValueError) as error:
                print(f"warning: pictures show channels of the latents, which cannot be decoded: {error}", flush=True)
                self._decodes = False
        shown = latents[:, [0, 1 % self.spec.channels, 2 % self.spec.channels]] / 2
        return shown.repeat_interleave(self.spec.stride, dim=2).repeat_interleave(self.spec.stride, dim=3)

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._load()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_tokenizer"}  # data workers never decode


def describe(
    options: Options, load: Callable[[], Tokenizer], look: bool = True, trust: Sequence[str] = ()
) -> TokenizerInfo:
    """What is known of a tokenizer without loading an autoencoder.

    With `look` its files are fetched if they are not at hand; otherwise it is then taken for the published one.
    """
    kind = target("tokenizer", options, trust)
    name = kind.__module__.rpartition(".")[2]
    if not (isinstance(kind, type) and issubclass(kind, Autoencoder)):
        codec = load()
        scale, shift = getattr(codec, "scale", 1.0), getattr(codec, "shift", 0.0)
        return TokenizerInfo(name, "", None, codec.spec, scale, shift, codec.stochastic)
    weights, folder, config = str(options["weights"]), None, dict(kind.kind.official)
    if weights not in RANDOM and (look or Path(weights).expanduser().exists()):
        with contextlib.suppress(FileNotFoundError):
            folder = locate(weights)
            config |= read_config(folder, kind.kind.name)
    stochastic = options.get("posterior") == "sample"
    return TokenizerInfo(name, weights, folder, latent_spec(config), *scaling(config), stochastic)


def encoder_digest(described: TokenizerInfo) -> str:
    """What tells encoders of a class apart: that of the weights that make latents, or the name of random ones."""
    if described.folder is None:
        return described.weights
    hashed = hashlib.blake2b(digest_size=16)
    for key, value in tensors(described.folder):
        if not key.startswith(DECODER_KEYS):
            hashed.update(key.encode())
            hashed.update(value.tobytes())
    return hashed.hexdigest()


def stored_tokenizer(
    data: Options, options: Options, load: Callable[[], Tokenizer], trust: Sequence[str] = ()
) -> StoredTokenizer:
    """The tokenizer of a source of latents, which is one of `LatentSource`; see `describe`."""
    kind = target("data", data, trust)
    if not issubclass(kind, Store):
        look = not issubclass(kind, NiTLatents)  # which are of the published tokenizer
        ours = describe(options, load, look, trust)
        return StoredTokenizer(ours, kind.has_variance, load)
    made = read_manifest(Path(data["root"]))["tokenizer"]
    ours = describe(options, load, options.get("weights") != made["weights"], trust)
    scaling = (made["scale"], made["shift"])
    if not _same_encoder(ours, made) or (not ours.absent and (ours.scale, ours.shift) != scaling):
        raise ValueError(
            f"data.root={data['root']} was encoded by {made['name']} {made['weights']} (scale {made['scale']}), and "
            f"the tokenizer is {ours.name} {ours.weights} (scale {ours.scale}); choose that one, or encode again"
        )
    spec = LatentSpec(made["channels"], made["stride"])
    return StoredTokenizer(
        ours._replace(spec=spec, scale=scaling[0], shift=scaling[1]), "logvar" in made["moments"], load
    )


def _same_encoder(ours: TokenizerInfo, made: Mapping[str, Any]) -> bool:
    """Names on the hub tell encoders apart, and so do the weights themselves."""
    if ours.name.replace("_", "") != made["name"].replace("_", "").lower():  # stores of before say `DcAe`
        return False
    if ours.weights == made["weights"] and not Path(ours.weights).expanduser().exists():
        return True
    return not ours.absent and encoder_digest(ours) == made["digest"]
