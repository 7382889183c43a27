"""Models written as folders that `DiffusionPipeline.from_pretrained` loads; diffusers' own DiT, or with their code."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from genfound import build
from genfound.checkpoints import formats
from genfound.checkpoints.diffusers import native
from genfound.checkpoints.diffusers.source import STAND_INS, Merged
from genfound.checkpoints.official.dig import ALIASES
from genfound.config import compose, targets
from genfound.objectives.process import SCHEDULES
from genfound.runtime.files import atomic_folder
from genfound.tokenizers import LatentSpec, Undecodable
from genfound.tokenizers.autoencoder import Autoencoder

Config = Mapping[str, Any]

PIPELINE = "genfound.checkpoints.diffusers.pipeline"
WEIGHTS = "diffusion_pytorch_model.safetensors"
KEYS = {
    "channels": "in_channels",
    "width": "hidden_size",
    "heads": "num_heads",
    "label_drop": "class_dropout_prob",
    "experts": "num_experts",
    "top_k": "num_experts_per_tok",
}
"""Options of backbones -> their usual names in diffusers, where they differ."""

CONSTANT = {"attention": '"auto"', "recurrence": '"auto"', "activation_checkpointing": "False"}
"""Options of training, or of kernels that a folder has not."""

CONVOLUTION = "self.x_embedder.proj = PatchConvolution(in_channels, hidden_size, patch_size, patch_size)"
OF_DIT = (
    CONVOLUTION,
    "outputs = self.final_layer.linear.out_features",
    "self.final_layer.linear = PatchOutput(hidden_size, outputs, patch_size)",
    "rows, columns = (side // patch_size for side in input_size)",
    "self.pos_embed = nn.Parameter(position_table(rows, columns, hidden_size)[None], requires_grad=False)",
)

OF_JIT = (
    "self.x_embedder.proj1 = PatchConvolution(in_channels, bottleneck_dim, patch_size, patch_size, bias=False)",
    "self.x_embedder.proj2 = PatchConvolution(bottleneck_dim, hidden_size, 1)",
    *OF_DIT[1:],
)

OF_SHAPES = (
    (STAND_INS, "PatchConvolution"),
    (STAND_INS, "PatchOutput"),
    ("genfound.backbones.dit", "position_table"),
)

MODEL = '''"""{backbone} as a model of diffusers, by genfound; needs torch and diffusers."""

from diffusers.configuration_utils import register_to_config
{parts}

class {name}(FolderTransformer, {backbone}):
    """`{backbone}` as a model of diffusers, by whose options its configuration goes."""

    layout_class = {layout}

    @register_to_config
    def __init__(
        self,
        *,
        {arguments},
    ) -> None:
        {backbone}.__init__(
            self,
            {passed},
        )
{shapes}'''

NATIVE = (
    "DiTPipeline draws other pictures than genfound.sample: the time embedding of diffusers is not DiT's (frequencies "
    "i / 127), and all channels are guided; native=false draws the same"
)
WITH_CODE = "DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True) runs the two Python files in it"


class Code(NamedTuple):
    """How a family's files are named, and what gives its parameters their released shapes."""

    name: str  # before Transformer2DModel and Pipeline
    stem: str
    shapes: tuple[str, ...] = OF_DIT
    second: tuple[str, ...] = ()  # ends of names that tensors have beside those of the class

    @property
    def of_one_size(self) -> bool:
        """Whether its weights hold a table of positions."""
        return OF_DIT[-1] in self.shapes


CODE = {
    "dit": Code("OfficialDiT", "transformer_dit"),
    "sit": Code("SiT", "transformer_sit"),
    "fit": Code("FiT", "fit_transformer_2d", ()),
    "nit": Code("NiT", "transformer_nit", (CONVOLUTION,)),
    "dit_moe": Code("DiTMoE", "transformer_dit_moe"),
    "lightningdit": Code("LightningDiT", "transformer_lightningdit"),
    "jit": Code("JiT", "transformer_jit", OF_JIT),
    "dig": Code("DiG", "transformer_dig", second=tuple(ALIASES)),
}
"""Module of a backbone -> its code in a folder."""


class Model(NamedTuple):
    """Weights in released shapes, and what they belong to."""

    config: Config
    state: Mapping[str, Tensor]
    class_names: list[str]
    sizes: list[tuple[int, int]]


def write(model: Model, folder: Path, own_dit: bool | str, path: Path) -> list[str]:
    """Write a folder, whole or not at all.

    Args:
        own_dit: true for diffusers' own DiT, false for code in the folder, or `auto`: the first where it can be.
        path: where the weights are from.

    Returns:
        What is to be known about it, in lines for the user.
    """
    family = str(model.config["model"]["_target_"]).split(".")[-2]
    if family not in CODE:
        raise ValueError(f"format=diffusers takes {', '.join(CODE)}, not model={family}")
    scheduler, codec = _scheduler(model.config), build.tokenizer_if_there(model.config, path)
    hindrance = _hindrance(model, family, codec)
    if own_dit is True and hindrance:
        raise ValueError(f"native=true: this is no DiT of diffusers; {hindrance}; set native=false")

    def fill(work: Path) -> None:
        index = _decoder(codec, work)
        if own_dit and not hindrance:
            index |= _native(model, codec.spec.stride, work)
        else:
            index |= _with_code(model, CODE[family], family, codec.spec, work)
        _json(work / "scheduler" / "scheduler_config.json", scheduler)
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        index["id2label"] = {str(number): name for number, name in enumerate(model.class_names)}
        _json(work / "model_index.json", {**index, "_diffusers_version": _version()})

    atomic_folder(folder, fill)
    without = [f"without a vae: {codec.reason}"] if isinstance(codec, Undecodable) else []
    return [*without, *_unlike(model.config), WITH_CODE if hindrance or not own_dit else NATIVE]


def check(folder: Path, own_dit: bool | str) -> None:
    """Raise a ValueError if these options of `write` cannot be meant."""
    if own_dit not in (True, False, "auto"):
        raise ValueError(f"native={own_dit} is unknown; choose auto, true or false")
    if folder.suffix in (".safetensors", ".pt", ".pth", ".bin"):
        raise ValueError(f"to={folder} must be a folder for format=diffusers")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"to={folder} exists; choose another folder, or remove it")


def _hindrance(model: Model, family: str, codec: Any) -> str | None:
    if family != "dit":
        return f"model={family} is none"
    if not (isinstance(codec, Autoencoder) and codec.kind.name == "AutoencoderKL"):
        return codec.reason if isinstance(codec, Undecodable) else "its decoder is an AutoencoderKL (tokenizer=sd_vae)"
    return native.why_not(model.config, len(model.class_names), model.sizes)


def _native(model: Model, stride: int, work: Path) -> dict[str, Any]:
    """Write transformer/ of diffusers' own DiT; its entries in the index."""
    config = native.config_of(model.state, model.config["model"]["heads"], model.sizes[0][0] // stride)
    _transformer(model, native.to_native(model.state), {"_class_name": native.CLASSES[0], **config}, work)
    return {"_class_name": "DiTPipeline", "transformer": ["diffusers", native.CLASSES[0]]}


def _with_code(model: Model, code: Code, family: str, spec: LatentSpec, work: Path) -> dict[str, Any]:
    """Write transformer/ with its code, and its pipeline; their entries in the index.

    Files of code have names of their own by family: diffusers copies those of all folders to one place, where Python
    takes a file for compiled that is as long and as old, in seconds, as the last one of its name.
    """
    options = {**model.config["model"], "num_classes": len(model.class_names)}
    backbone = options.pop("_target_").rpartition(".")[2]
    options = {key: value for key, value in options.items() if key not in CONSTANT} | {"channels": spec.channels}
    if options.get("learn_sigma") == "auto":
        options["learn_sigma"] = build.objective(model.config).learned_variance
    name, config = f"{code.name}Transformer2DModel", {KEYS.get(key, key): value for key, value in options.items()}
    if code.of_one_size:
        config["input_size"] = [side // spec.stride for side in model.sizes[0]]
    state = {key: tensor for key, tensor in model.state.items() if not key.endswith(code.second)}
    _transformer(model, state, {"_class_name": name, **config}, work)
    text = _network(name, family, backbone, list(options), model.config["model"], code)
    (work / "transformer" / f"{code.stem}.py").write_text(text, encoding="utf-8")
    pipeline = Merged([(PIPELINE, "SOURCE"), (PIPELINE, "FolderPipeline")]).text()
    pipeline = pipeline.replace("FolderPipeline", f"{code.name}Pipeline")
    stem = f"pipeline_{family}"
    (work / f"{stem}.py").write_text(f'"""The pipeline of {backbone}, by genfound."""\n\n{pipeline}', encoding="utf-8")
    index = {"_class_name": [stem, f"{code.name}Pipeline"], "transformer": [code.stem, name]}
    return index | {"sample_size": list(model.sizes[0]), "stride": spec.stride, **_drawn(model.config)}


def _network(name: str, family: str, backbone: str, options: list[str], model: Config, code: Code) -> str:
    """The file of a network that is a model of diffusers."""
    layout = "Dense" if "dense" in targets.target("model", model, ()).layouts else "Packed"
    roots = [(f"genfound.backbones.{family}", backbone), (f"genfound.layouts.{layout.lower()}", layout)]
    roots += [(STAND_INS, part) for part in ("SOURCE", "FolderTransformer")]
    roots += [root for root in OF_SHAPES if any(root[1] in line for line in code.shapes)]
    arguments = [KEYS.get(option, option) for option in options] + ["input_size"] * code.of_one_size
    passed = [f"{option}={KEYS.get(option, option)}" for option in options]
    passed += [f"{key}={value}" for key, value in CONSTANT.items() if key in model]
    return MODEL.format(
        name=name,
        backbone=backbone,
        layout=layout,
        parts=Merged(roots).text(),
        arguments=",\n        ".join(arguments),
        passed=",\n            ".join(passed),
        shapes="".join(f"        {line}\n" for line in code.shapes),
    )


def _transformer(model: Model, state: Mapping[str, Tensor], config: Config, work: Path) -> None:
    """Write weights, with our configuration in their header, and config.json."""
    told = {key: value for key, value in model.config.items() if key not in ("trust", "format")}
    note = {"format": formats.FORMAT, "config": told, "class_names": model.class_names, "sizes": model.sizes}
    _json(work / "transformer" / "config.json", {**config, "_diffusers_version": _version()})
    formats.write(work / "transformer" / WEIGHTS, state, note)


def _scheduler(config: Config) -> dict[str, Any]:
    """The scheduler of diffusers for an objective."""
    objective, sampler = config["objective"], config["sampler"]
    kind = str(objective["_target_"]).rpartition(".")[2]
    if kind == "Flow" and objective["path"] == "linear" and objective["prediction"] in ("velocity", "x0"):
        shift = sampler.get("shift", 1.0)
        shift = float(shift) if isinstance(shift, int | float) else 1.0
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift}
    if kind != "Gaussian":
        what = "objective=gaussian, and flows of objective.path=linear and objective.prediction=velocity or x0"
        raise ValueError(f"format=diffusers takes {what}, for which diffusers has schedulers")
    steps = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    if (objective["schedule"], objective["timesteps"]) != ("linear", 1000):
        steps = {"trained_betas": SCHEDULES[objective["schedule"]](objective["timesteps"]).tolist()}
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": objective["timesteps"],
        **steps,
        "clip_sample": bool(objective["clip_x0"]),
        "prediction_type": "epsilon" if objective["prediction"] == "epsilon" else "sample",
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }


def _drawn(config: Config) -> dict[str, Any]:
    """Steps and guidance of a call that says nothing."""
    guidance, steps = compose.fill_option("guidance", config["guidance"]), config["sampler"].get("steps")
    plain = guidance.get("name") == "cfg" and config["model"]["label_drop"] > 0
    return {
        "num_inference_steps": steps if isinstance(steps, int) else 50,
        "guidance_scale": float(guidance["scale"]) if plain else 1.0,
        "guidance_interval": list(guidance["interval"]) if plain else [0.0, 1.0],
        "guidance_ends": guidance.get("ends", "inclusive"),
        "guidance_channels": 3 if plain and guidance["channels"] == "first3" else None,
        "noise_scale": float(config["objective"].get("noise_scale", 1.0)),
        "prediction": config["objective"]["prediction"],
        "sigma_floor": float(config["objective"].get("sigma_floor", 0.0)),
    }


def _unlike(config: Config) -> list[str]:
    """What the guidance of a model has and the pipelines of folders have not."""
    guidance = compose.fill_option("guidance", config["guidance"])
    usual = {"name": "cfg", "schedule": "constant"}
    odd = [f"guidance.{key}={guidance[key]}" for key, value in usual.items() if guidance.get(key, value) != value]
    if not odd or guidance.get("name") == "none":
        return []
    return [f"without {odd[0]}: its pipeline guides by the null label, at a constant scale"]


def _decoder(codec: Any, work: Path) -> dict[str, Any]:
    """Write vae/ where there is one; its entry in the index."""
    if not isinstance(codec, Autoencoder):
        return {"vae": [None, None]}
    codec.model.save_pretrained(work / "vae")
    return {"vae": ["diffusers", codec.kind.name]}


def _version() -> str:
    return importlib.metadata.version("diffusers")


def _json(file: Path, content: Config) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
