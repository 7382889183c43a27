"""What a backbone tells about itself."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genfound.batch import Batch
from genfound.config import compose, targets
from genfound.config.options import text_sizes
from genfound.layers.embed import TimestepEmbedder
from genfound.layers.initial import Draw, local
from genfound.layers.moe import Experts, Router
from genfound.layers.rope import Rope
from genfound.rng import Rng


class TokenSpec(NamedTuple):
    """What a token is made of: a patch of `patch_size` squared latent pixels of `channels` channels."""

    channels: int
    patch_size: int


class Flops(NamedTuple):
    """Additions and multiplications of the matrix products in one forward pass over images of n tokens each."""

    per_image: int  # of the layers that see each image once
    per_token: int  # of those that see each of its tokens once
    per_pair: int  # of attention, for each of the n^2 pairs of an image's tokens

    def total(self, images: float, tokens: float, pairs: float) -> float:
        """Of several images together: how many, their tokens, and their pairs of tokens."""
        return self.per_image * images + self.per_token * tokens + self.per_pair * pairs


class Backbone(nn.Module):
    """A network of (batch, t) -> tensor shaped like `batch.x`.

    It knows no objective, noise, guidance or tokenizer, and holds no frozen network.
    """

    layouts: tuple[str, ...]  # names of the memory layouts it takes
    time: str  # `data0`, t from 0 (data) to 1 (noise); `data1`, reversed; or `index`, integer steps
    token_spec: TokenSpec
    null_label: int | None  # the label that means "no label"
    text_width: int | None = None  # values of each text token of a batch; `None` where images have classes
    text_tokens: int = 0  # of a caption at most
    blocks: nn.ModuleList  # in their order
    passes_tokens: bool = True  # from block to block, which a loss can align; not feature maps
    activation_checkpointing: bool | int = False  # recompute each block, or every k-th, in the backward pass
    residual: str  # precision of what passes from block to block, where a backbone has a choice; see `residual_stream`

    @property
    def device(self) -> torch.device | None:
        """Where its parameters are, if it has any."""
        return next((parameter.device for parameter in self.parameters()), None)

    @classmethod
    def from_preset(cls, name: str, *, num_classes: int = 1000, seed: int = 0, **options: Any) -> Self:
        """A network as conf/model/ describes it, initialised as in training, e.g. `NiT.from_preset("xl")`.

        Args:
            name: the option without its family, or whole: `xl` or `nit_xl`.
            num_classes: classes of the data.
            seed: of the initial values; on torch's `meta` device there are none.
            options: other values of the preset's keys; latents have the channels of its tokenizer unless said.

        Raises:
            ValueError: no option of this class has the name, or it has no such key.
        """
        config = compose.compose("train", [f"model={_preset(cls, name)}"])
        model = {key: value for key, value in config["model"].items() if key != compose.TARGET}
        if unknown := sorted(options.keys() - model.keys()):
            raise ValueError(f"{unknown[0]} is no key of model={name}; its keys: {', '.join(model)}")
        model |= options
        if model["channels"] is None:
            model["channels"] = targets.target("tokenizer", config["tokenizer"], ()).published.channels
        if model.get("learn_sigma") == "auto":
            with torch.device("cpu"):  # also where the network itself is built on meta
                model["learn_sigma"] = targets.instantiate("objective", config["objective"], ()).learned_variance
        with torch.device("meta"):
            net = cls(**model, num_classes=num_classes, **text_sizes(config, cls))
        if torch.get_default_device().type != "meta":
            net.materialise(Rng(seed, "initialise"))
        return net

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """Prediction for `batch.x` at times t (B,)."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def initialise(self, rng: Rng | None = None) -> None:
        """Set all parameters: Xavier-uniform matrices, normal(0.02) embeddings, biases 0, norms 1.

        A backbone with buffers, other parameters or other laws, e.g. zeros where blocks start as identity, extends it.
        """
        draw = Draw(self, rng)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                draw(nn.init.xavier_uniform_, module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                draw(nn.init.normal_, module.weight, std=0.02)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, (Experts, Router)):
                module.initialise(draw)
        embedders = [module for module in self.modules() if isinstance(module, TimestepEmbedder)]
        for matrix in (p for embedder in embedders for p in embedder.parameters() if p.ndim == 2):
            draw(nn.init.normal_, matrix, std=0.02)

    @torch.no_grad()
    def materialise(self, rng: Rng) -> None:
        """Give a network that was built on `meta` memory on the default device, and its initial values.

        One that was sharded there gets those of its part.
        """
        self.to_empty(device=torch.get_default_device())
        own = [(name, local(x).view(-1)[:1]) for name, x in chain(self.named_parameters(), self.named_buffers())]
        own = [(name, first) for name, first in own if first.is_floating_point()]
        for _, first in own:
            first.fill_(torch.nan)
        self.initialise(rng)
        for name, first in own:
            if first.isnan().any():
                raise ValueError(f"{type(self).__name__}.initialise must set every parameter and buffer, also {name}")

    def compile_blocks(self) -> None:
        """Compile the blocks for training, all of one kind together; evaluation, of any shape, stays eager."""
        torch._dynamo.config.optimize_ddp = False  # a block is small enough to overlap with communication as it is
        limit = torch._dynamo.config.recompile_limit  # of graphs; each of a U-Net's blocks may have its own
        torch._dynamo.config.recompile_limit = max(limit, len(self.blocks))
        compiled = torch.compile(_forward)
        for block in self.blocks:  # not their hooks, by which FSDP gathers the weights
            block.forward = partial(_in_training, compiled, block)  # type: ignore[method-assign]

    def residual_stream(self, x: Tensor) -> Tensor:
        """What passes from block to block: float32, with `residual=bf16` bfloat16 where arithmetic is (autocast)."""
        device = x.device.type
        rounded = self.residual == "bf16" and torch.is_autocast_enabled(device)
        return x.to(torch.get_autocast_dtype(device)) if rounded else x.float()

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """A block's output; with activation checkpointing nothing else of it is kept for the backward pass."""
        every = int(self.activation_checkpointing)
        if every and self.training and [*self.blocks].index(block) % every == 0:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def image_tokens(self, hidden: Tensor, block: int, batch: Batch) -> Tensor:
        """Those of the images among the tokens that leave block number `block`, from 0; here all of them."""
        return hidden

    def flops(self) -> Flops:
        """Of linear layers, depth-wise convolutions, and attention that ends in them; recurrences tell their own.

        A backbone with other products adds them.
        """
        per_image = per_token = per_pair = 0
        for name, layer in self.named_modules():
            per_token += getattr(layer, "flops_per_token", 0)
            if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
                per_token += 2 * layer.weight.numel()
            if not isinstance(layer, nn.Linear):
                continue
            if any(part == "t_embedder" or part.endswith("adaLN_modulation") for part in name.split(".")):
                per_image += 2 * layer.weight.numel()
            else:
                per_token += 2 * layer.weight.numel()
            if name.endswith(("attn.proj", "attn.out_proj")):
                per_pair += 4 * layer.in_features
        return Flops(per_image, per_token, per_pair)

    def reposition(self, rope: Mapping[str, Any]) -> None:
        """Change the rule of the rotary positions, e.g. for images larger than those of training.

        Args:
            rope: attributes of the network's `Rope`; those that are `None` stay as they are.
        """
        given = {key: value for key, value in rope.items() if value is not None}
        if not given:
            return
        if not isinstance(getattr(self, "rope", None), Rope):
            raise ValueError(f"rope.{next(iter(given))}: {type(self).__name__} has no rotary positions")
        self.rope = replace(self.rope, **given)  # type: ignore[has-type]


def _preset(kind: type[Backbone], name: str) -> str:
    """The option of conf/model/ that a class means by a name."""
    path, family = f"{kind.__module__}.{kind.__qualname__}", kind.__module__.rpartition(".")[2]
    sized = (option for option in compose.option_names("model") if "_" in option and option != family)
    known = [option for option in sized if _target(option) == path]
    found = [option for option in (f"{family}_{name}", name) if option in known]
    if not found:
        short = ", ".join(option.removeprefix(f"{family}_") for option in known)
        raise ValueError(f"{kind.__name__} has no preset {name}; choose one of {short}")
    return found[0]


def _target(option: str) -> Any:
    """The class that an option of conf/model/ names, itself or through what it inherits."""
    file = compose.read_yaml(Path(compose.config_dir()) / "model" / f"{option}.yaml")
    parents = [parent for parent in file.get("defaults", []) if isinstance(parent, str) and parent != "_self_"]
    own = file.get("model", {}).get(compose.TARGET)
    return own if own or not parents else _target(parents[0])


def _forward(block: nn.Module, *inputs: Any) -> Any:
    return type(block).forward(block, *inputs)


def _in_training(compiled: Callable[..., Any], block: nn.Module, *inputs: Any) -> Any:
    return (compiled if block.training else _forward)(block, *inputs)
