"""The pipeline of a folder of diffusers: classes to pictures with a network of this folder and any of its schedulers.

`source` copies this into folders, and nothing here imports it; there it needs torch and diffusers alone.
"""

import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genfound.rng import Rng
from genfound.samplers.guidance import ENDS

SOURCE = Path(__file__).read_text(encoding="utf-8")
"""Of this file, for a pipeline that is saved again."""


class FolderPipeline(DiffusionPipeline):
    """Class-conditional pictures.

    Args:
        transformer: the network.
        scheduler: of flow matching (`FlowMatchEulerDiscreteScheduler` and others) or of diffusion in 1,000 steps.
        vae: its decoder makes pictures; without one there are latents, and pictures where latents are pixels.
        id2label: number of a class -> its names, between commas.
        sample_size: [height, width] in pixels of a picture.
        stride: pixels of a side for one of a latent.
        num_inference_steps, guidance_scale, guidance_interval, guidance_channels: of a call that says nothing.
        guidance_ends: of the interval, `inclusive`, `strict`, or `open`, strict but at 0 and 1.
        noise_scale: standard deviation of the noise.
        prediction: of a network of a flow, `velocity` or the data, `x0`.
        sigma_floor: noise level that the velocity of predicted data is divided by at least.

    Args of a call:
        class_labels: numbers or names.
        height, width: in pixels.
        guidance_scale: of classifier-free guidance; 1 is none.
        num_inference_steps: of the scheduler.
        generator: of the noise, one, or one for each picture.
        latents: the noise itself, (B, C, h, w).
        seed: draw the noise as `genfound.sample seed=...` does: of each picture from the seed and its place.
        guidance_interval: [low, high] of noise levels, 0 at data and 1 at noise, where guidance acts.
        guidance_channels: guide only the first so many channels of a latent.
        output_type: `pil`, `np` (B, H, W, 3) and `pt` (B, 3, H, W) in [0, 1], or `latent`.
        return_dict: an `ImagePipelineOutput` instead of a tuple.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ("vae",)

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any = None,
        id2label: dict[str, str] | None = None,
        sample_size: list[int] | None = None,
        stride: int = 8,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: list[float] | None = None,
        guidance_channels: int | None = None,
        guidance_ends: str = "inclusive",
        noise_scale: float = 1.0,
        prediction: str = "velocity",
        sigma_floor: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=id2label,
            sample_size=sample_size or [256, 256],
            stride=stride,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval or [0.0, 1.0],
            guidance_channels=guidance_channels,
            guidance_ends=guidance_ends,
            noise_scale=noise_scale,
            prediction=prediction,
            sigma_floor=sigma_floor,
        )
        named = ((name.strip(), int(k)) for k, names in (id2label or {}).items() for name in names.split(","))
        self.labels = dict(sorted(named))

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Names of classes -> their numbers."""
        names = [label] if isinstance(label, str) else label
        if unknown := [name for name in names if name not in self.labels]:
            raise ValueError(f"class_labels: {unknown[0]} is no class; the classes: {', '.join(self.labels)}")
        return [self.labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        seed: int | None = None,
        guidance_interval: Sequence[float] | None = None,
        guidance_channels: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw a picture of each class; for the arguments see the class.

        Raises:
            ValueError: an unknown class or output type, a size that does not divide into patches, no decoder.
        """
        labels = self._label_numbers(class_labels)
        shape = self._latent_shape(len(labels), height, width, output_type)
        noise = self._noise(shape, generator, latents, seed)
        usual, steps = self.config, num_inference_steps or self.config.num_inference_steps
        scale = usual.guidance_scale if guidance_scale is None else guidance_scale
        if scale != 1 and self.transformer.null_label is None:
            raise ValueError(f"guidance_scale={scale} needs a network with a null class; give 1")
        interval, channels = guidance_interval or usual.guidance_interval, guidance_channels or usual.guidance_channels
        drawn = self._denoise(noise, labels, steps, scale, interval, channels or shape[1])
        images = drawn if output_type == "latent" else self._decode(drawn, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, shape: tuple[int, ...], generator: Any, latents: Tensor | None, seed: int | None) -> Tensor:
        """(B, C, h, w) float32."""
        scale, device = self.config.noise_scale, self._execution_device
        if latents is None and seed is not None:
            latents = scale * torch.stack([Rng(seed, "sample", k).normal("noise", shape[1:]) for k in range(shape[0])])
        if latents is None:
            latents = scale * randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}, and these pictures need {shape}")
        return latents.to(device, torch.float32)

    def _label_numbers(self, class_labels: int | str | list[int | str]) -> Tensor:
        given = class_labels if isinstance(class_labels, list) else [class_labels]
        numbers = [self.get_label_ids(label)[0] if isinstance(label, str) else label for label in given]
        classes = self.transformer.config.num_classes
        if wrong := [number for number in numbers if not 0 <= number < classes]:
            raise ValueError(f"class_labels: {wrong[0]} is not one of 0 to {classes - 1}")
        return torch.tensor(numbers, device=self._execution_device)

    def _latent_shape(self, count: int, height: int | None, width: int | None, output_type: str) -> tuple[int, ...]:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type} is unknown; choose pil, np, pt or latent")
        config, usual = self.transformer.config, self.config.sample_size
        if output_type != "latent" and self.vae is None and (config.in_channels != 3 or self.config.stride != 1):
            raise ValueError("there is no vae to decode latents; give the pipeline one, or output_type='latent'")
        sides, unit = (height or usual[0], width or usual[1]), self.config.stride * config.patch_size
        if any(side <= 0 or side % unit for side in sides):
            raise ValueError(f"height and width must be multiples of {unit}, not {sides[0]} and {sides[1]}")
        return (count, config.in_channels, *(side // self.config.stride for side in sides))

    def _denoise(
        self, x: Tensor, labels: Tensor, steps: int, scale: float, interval: Sequence[float], channels: int
    ) -> Tensor:
        """Noise (B, C, h, w) -> latents."""
        levels = self._set_timesteps(steps)
        guided = ENDS[self.config.guidance_ends]
        null = torch.full_like(labels, self.transformer.null_label or 0)
        known = inspect.signature(self.scheduler.step).parameters
        options = {"use_clipped_model_output": True} if "use_clipped_model_output" in known else {}
        for level, t in zip(self.progress_bar(levels), self.scheduler.timesteps, strict=True):
            state = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            out = self._predict(state, labels, level, t)
            if scale != 1 and guided(interval[0], level, interval[1]):
                other = self._predict(state, null, level, t)[:, :channels]
                out[:, :channels] = other + scale * (out[:, :channels] - other)
            x = self.scheduler.step(out, t, x, **options).prev_sample
        return x

    def _set_timesteps(self, steps: int) -> list[float]:
        """Set those of the scheduler, of a flow equidistant before their shift; the noise level at each of them."""
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
        if self._flow and "sigmas" in inspect.signature(self.scheduler.set_timesteps).parameters:
            self.scheduler.set_timesteps(sigmas=grid.tolist(), device=self._execution_device)
            shift = self.scheduler.config.get("shift", 1.0)
            return (shift * grid / (shift * grid + (1 - grid))).tolist()
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        last = self.scheduler.config.num_train_timesteps - (0 if self._flow else 1)
        return [float(t) / last for t in self.scheduler.timesteps]

    @property
    def _flow(self) -> bool:
        kind = self.scheduler.config.get("prediction_type", "flow_prediction")
        return "FlowMatch" in type(self.scheduler).__name__ or kind == "flow_prediction"

    def _predict(self, x: Tensor, labels: Tensor, level: float, t: Tensor) -> Tensor:
        """(B, C, h, w) what the scheduler takes: velocity from data to noise, or noise or data."""
        reverse = self.transformer.time == "data1"
        time = (1 - level if reverse else level) if self._flow else float(t)
        times = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
        out = self.transformer(x, times, labels).sample[:, : x.shape[1]].float()
        if self._flow and self.config.prediction == "x0":
            return (x - out) / max(level, self.config.sigma_floor)
        return -out if reverse and self._flow else out

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Latents -> pictures."""
        if self.vae is not None:
            config = self.vae.config
            latents = latents / config.scaling_factor + (config.get("shift_factor") or 0)
            latents = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
        pictures = (latents / 2 + 0.5).clamp(0, 1)
        return VaeImageProcessor(do_normalize=False).postprocess(pictures, output_type, do_denormalize=None)

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As in diffusers, with the two files of code, which that would leave out."""
        super().save_pretrained(save_directory, *args, **options)
        folder, code = Path(save_directory), sys.modules[type(self.transformer).__module__]
        own, stem = (type(part).__module__.rpartition(".")[2] for part in (self, self.transformer))
        (folder / f"{own}.py").write_text(SOURCE, encoding="utf-8")
        (folder / "transformer" / f"{stem}.py").write_text(code.SOURCE, encoding="utf-8")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index |= {"_class_name": [own, type(self).__name__]}
        index |= {"transformer": [stem, type(self.transformer).__name__]}
        index.pop("_name_or_path", None)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
