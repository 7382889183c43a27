"""ADM's evaluation suite and torch-fidelity's conventions, on features and images that follow from names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfound.data.images.pixels import to_uint8
from genfound.metrics.frechet import Gaussian, Moments, frechet_distance
from genfound.metrics.inception import InceptionV3
from genfound.metrics.inception_score import adm_score, probabilities, torch_fidelity_score
from genfound.metrics.kid import kernel_distance
from genfound.metrics.precision_recall import manifold, precision_recall, squared_distances
from genfound.metrics.resize import tf1_resize
from tests.golden.adapters import Results, adapter
from tests.golden.fill import parameter, unit

ABSOLUTE = 1e-6
"""Of a distance that is 0."""


def features(entry: Mapping[str, Any]) -> Tensor:
    """(u + mix * roll(u)) * scale + shift in float32, with or without a ReLU."""
    unknown = entry.keys() - {"fill", "shape", "recipe"} | entry["recipe"].keys() - {"scale", "mix", "shift", "relu"}
    if unknown:
        raise NotImplementedError(f"features with {sorted(unknown)}")
    recipe, u = entry["recipe"], unit(entry["fill"], entry["shape"])
    mix, scale, shift = (np.float32(recipe[key]) for key in ("mix", "scale", "shift"))
    values = (u + mix * np.roll(u, -1, axis=1)) * scale + shift
    return torch.from_numpy(np.maximum(values, 0) if recipe["relu"] else values)


def pictures(entry: Mapping[str, Any]) -> Tensor:
    """(B, 3, h, w) uint8."""
    if entry["dtype"] != "uint8":
        raise NotImplementedError(f"images of {entry['dtype']}")
    values = np.floor((unit(entry["fill"], entry["shape"]) + 2) * 64).clip(0, 255)
    return torch.from_numpy(values.astype(np.uint8)).permute(0, 3, 1, 2)


def refuse(config: Mapping[str, Any], *known: str) -> None:
    unknown = sorted(config.keys() - set(known))
    if unknown:
        raise NotImplementedError(f"config with {unknown}")


def near(outputs: Mapping[str, Any], name: str, ours: float, absolute: float = 0.0) -> None:
    """Within the fixture's own relative tolerance, which is not the runner's."""
    allowed = max(outputs["relative_tolerance"] * abs(outputs[name]), absolute)
    assert abs(ours - outputs[name]) <= allowed, f"{name} is {ours}, not {outputs[name]}"


@adapter("metrics", "fid", ("fid", "fid_by_eigenvalues", "sqrtm_fallback_used", "relative_tolerance", "mu_dtype"))
def fid(fixture: Mapping[str, Any]) -> Results:
    """The distance, within the fixture's tolerance, or 1e-6 of one that is 0; our mean is float64, not float32."""
    refuse(fixture["config"])
    a, b = (Moments.of(features(fixture["inputs"][name])).gaussian() for name in ("reference", "samples"))
    assert isinstance(a, Gaussian)
    distance = frechet_distance(b, a)
    for name in ("fid", "fid_by_eigenvalues"):
        near(fixture["outputs"], name, distance, ABSOLUTE)
    return {
        "reference_mu": a.mean,
        "reference_sigma": a.covariance,
        "sigma_dtype": str(a.covariance.dtype).removeprefix("torch."),
    }


@adapter("metrics", "inception_score", ("inception_score", "relative_tolerance"))
def inception_score(fixture: Mapping[str, Any]) -> Results:
    """ADM's score of pool features, with the softmax matrix of the fixture."""
    config = fixture["config"]
    refuse(config, "split_size", "w_shape")
    matrix = torch.from_numpy(unit("metrics.softmax_weight", config["w_shape"])) * 2**-6
    logits = features(fixture["inputs"]["pool"]) @ matrix
    near(fixture["outputs"], "inception_score", adm_score(logits, config["split_size"]).mean)
    return {"softmax": probabilities(logits)}


HALF = (
    "precision", "recall", "radii_reference", "radii_samples", "distances_first_8x8",
    "half_precision_absolute_tolerance", "half_distance_absolute_tolerance", "exact_margin_of_closest_comparison",
)  # fmt: skip


def compare_half(outputs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Float16 distances, within the fixture's absolute tolerances."""
    for name, value in ours.items():
        shares = name in ("precision", "recall")
        allowed = outputs[f"half_{'precision' if shares else 'distance'}_absolute_tolerance"]
        entry = outputs[name]
        wanted = entry["values"] if isinstance(entry, Mapping) else entry
        found = np.asarray(value).ravel()[:: entry["stride"] if isinstance(entry, Mapping) else 1]
        assert np.abs(found - np.asarray(wanted)).max() <= allowed, name


@adapter("metrics", "precision_recall", HALF)
def improved(fixture: Mapping[str, Any]) -> Results:
    """Exact values, and those of ADM's float16 distances."""
    config = fixture["config"]
    refuse(config, "nhood_sizes", "row_batch_size", "col_batch_size", "clamp_to_percentile")
    if config["clamp_to_percentile"] is not None:
        raise NotImplementedError("radii clamped to a percentile")
    k, blocks = config["nhood_sizes"], (config["row_batch_size"], config["col_batch_size"])
    results: dict[str, Any] = {}
    for prefix, half in (("", True), ("exact_", False)):
        sets = [features(fixture["inputs"][name]) for name in ("reference", "samples")]
        if not half:
            sets = [points.double() for points in sets]
        reference, samples = (manifold(points, k, half, *blocks) for points in sets)
        shares = precision_recall(reference, samples, half, *blocks)
        found = {"precision": shares.precision, "recall": shares.recall, "radii_reference": reference.radii}
        results |= {f"{prefix}{name}": value for name, value in found.items()}
        if half:
            first = squared_distances(*(points[:8] for points in sets), half=True)
            found |= {"radii_samples": samples.radii, "distances_first_8x8": first}
            compare_half(fixture["outputs"], found)
    return results


@adapter("metrics", "tf1_resize")
def resize(fixture: Mapping[str, Any]) -> Results:
    """The resize, then (x - 128) / 128."""
    refuse(fixture["config"], "size")
    image = pictures(fixture["inputs"]["image"])
    resized = (tf1_resize(image, *fixture["config"]["size"]) - 128) / 128
    return {"out_nhwc": resized.permute(0, 2, 3, 1), "image_first_16": image.permute(0, 2, 3, 1).flatten()[:16]}


@adapter("metrics", "inception_v3")
@torch.no_grad()
def inception(fixture: Mapping[str, Any]) -> Results:
    """All features; the three averaged maps inside are read off the network while it runs."""
    refuse(fixture["config"], "fill_prefix", "num_batches_tracked")
    prefix, state = fixture["config"]["fill_prefix"], {}
    for key, shape in fixture["parameters"]:
        state[key] = parameter(prefix + key, shape)
    for key, shape in fixture["buffers"]:
        u = unit(prefix + key, shape)
        state[key] = 0.125 * u if key.endswith("running_mean") else 0.5 + 0.0625 * u
    net = InceptionV3()
    missing, unexpected = net.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    seen: dict[str, Tensor] = {}

    def entering(name: str) -> Any:
        return lambda module, inputs: seen.update({name: inputs[0].mean(dim=(2, 3))})

    net.Conv2d_3b_1x1.register_forward_pre_hook(entering("feature_64"))
    net.Mixed_5b.register_forward_pre_hook(entering("feature_192"))
    net.Mixed_7a.register_forward_pre_hook(entering("feature_768"))
    pool, spatial, logits = net(pictures(fixture["inputs"]["image"]))
    biased = logits + net.fc.bias
    return {"pool_2048": pool, "spatial_2023": spatial, "logits_unbiased": logits, "logits": biased, **seen}


@adapter(
    "metrics",
    "torch_fidelity",
    ("kid_mean", "kid_std", "isc_mean_shuffled", "isc_std_shuffled", "isc_mean", "isc_std", "precision", "recall",
     "fid", "relative_tolerance"),
)  # fmt: skip
def torch_fidelity(fixture: Mapping[str, Any]) -> Results:
    """All of torch-fidelity's figures, within the fixture's tolerance."""
    config, outputs = fixture["config"], fixture["outputs"]
    refuse(config, "kid_subsets", "kid_subset_size", "isc_splits", "rng_seed")
    if config["rng_seed"] != 2020:
        raise NotImplementedError("another seed than torch-fidelity's")
    samples, reference = (features(fixture["inputs"][name]) for name in ("samples", "reference"))
    kid = kernel_distance(samples, reference, config["kid_subsets"], config["kid_subset_size"])
    shuffled, plain = (torch_fidelity_score(samples, config["isc_splits"], shuffle) for shuffle in (True, False))
    shares = precision_recall(manifold(reference.double(), [3]), manifold(samples.double(), [3]))
    distance = frechet_distance(*(Moments.of(points).gaussian() for points in (samples, reference)))
    ours = {
        "kid_mean": kid.mean, "kid_std": kid.std, "isc_mean_shuffled": shuffled.mean, "isc_std_shuffled": shuffled.std,
        "isc_mean": plain.mean, "isc_std": plain.std, "precision": shares.precision[0], "recall": shares.recall[0],
        "fid": distance,
    }  # fmt: skip
    for name, value in ours.items():
        near(outputs, name, value)
    return ours


@adapter("metrics", "to_uint8")
def bytes_of_images(fixture: Mapping[str, Any]) -> Results:
    """Both rules; DiT's rounds halves up, that of REPA and NiT truncates."""
    config, given = fixture["config"], fixture["inputs"]
    refuse(config, "scale")
    x = torch.tensor([*given["edge"], *(unit(given["x"]["fill"], given["x"]["shape"]).ravel() * config["scale"])])
    ours = {}
    for name, rule in (("dit", "round"), ("repa", "truncate")):
        image = x.float().reshape(1, 1, -1).expand(3, -1, -1)
        ours[name] = to_uint8(image, rule)[0, :, 0].astype(int).tolist()
    return ours
