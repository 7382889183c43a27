"""Encoding once: images -> a latent store, resumable after every shard, on any number of processes.

A shard holds the latents of so many consecutive images. It is a pure function of the images and the tokenizer,
because images are encoded in batches of one size that never cross its border; so a process may be killed at any
moment, shards may be shared out over any number of them, and the store is the same. Rank r encodes every
`ranks`-th shard from r on; whoever finds all of them complete writes the manifest. Nobody waits for anybody.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genfound import build
from genfound.data import store
from genfound.data.base import PictureSource
from genfound.data.files import Viewed
from genfound.data.latents import describe, encoder_digest
from genfound.data.pictures import normalised, to_uint8
from genfound.data.shards import PARTIAL, write_whole
from genfound.data.work import Call, Calls, Part, Shard
from genfound.data.workers import read_ahead
from genfound.paths import flatten
from genfound.reporting.progress import Counter
from genfound.tokenizers import Tokenizer
from genfound.tokenizers.autoencoder import Autoencoder

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PIXELS = 2**20
"""Of a batch, for tokenizers that do not say."""

OURS = re.compile(r"\..*|manifest\.json|(train|val)-\d{5}\.(safetensors|png)")

FREE = ("source.root", "tokenizer.weights")
"""What may differ when encoding goes on: fingerprints say whether images and weights are the same."""


class Encoding:
    """A store in the making.

    Args:
        config: resolved configuration of `genfound.encode`.
        device: where the tokenizer works.

    Raises:
        FileNotFoundError: images, or the weights of the tokenizer, are missing.
        ValueError: an unknown option, or `out` holds something else.
    """

    def __init__(self, config: Mapping[str, Any], device: torch.device) -> None:
        if config["data"].get("source", "images") != "images":
            raise ValueError(
                f"data.source={config['data']['source']}: only images can be encoded; set data.source=images"
            )
        if config["dtype"] not in DTYPES:
            raise ValueError(f"dtype={config['dtype']} is unknown; choose {', '.join(DTYPES)}")
        for key in ("patch_size", "shard_images"):
            if config[key] < 1:
                raise ValueError(f"{key}={config[key]} must be at least 1")
        self.config, self.device = config, device
        self.out = Path(config["out"])
        self.dtype = DTYPES[config["dtype"]]
        self.variants = 2 if config["data"]["flip"] else 1
        self.codec = build.tokenizer(config)
        like = {**config, "layout": {"name": "packed"}, "model": {"patch_size": config["patch_size"]}}
        sources = {split: build.source(like, self.codec.spec, split) for split in ("train", "val")}
        self.parts = {split: Part.of(cast(PictureSource, source)) for split, source in sources.items()}
        self.planes = _moments(self.codec, self._blank()).shape[1]
        parts = self.parts.items()
        self.shards = [shard for split, part in parts for shard in part.shards(split, config["shard_images"])]
        self.manifest = self._claimed()
        self.digest = hashlib.blake2b(json.dumps(_fixed(self.manifest)).encode(), digest_size=8).hexdigest()

    def _blank(self) -> Tensor:
        side = self.codec.spec.stride * self.config["patch_size"]
        return torch.zeros(1, 3, side, side, device=self.device)

    def _claimed(self) -> dict[str, Any]:
        """The manifest of the folder, which is this store's or is made so.

        Raises:
            ValueError: the folder holds another store, or something else.
        """
        ours = self._described()
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            theirs = store.read_manifest(self.out)
        except (FileNotFoundError, ValueError):  # nothing yet, or damaged: the shards know where they belong
            strangers = [file.name for file in self.out.iterdir() if not OURS.fullmatch(file.name)]
            if strangers:
                raise ValueError(
                    f"out={self.out} holds {strangers[0]} and is no latent store; choose another out=..."
                ) from None
            self._write_manifest(ours)
            return ours
        before, now = _fixed(theirs), _fixed(ours)
        changed = [key for key in now | before if now.get(key) != before.get(key)]
        if changed:
            listed = "; ".join(
                f"{key}: {_short(before.get(key))} there, {_short(now.get(key))} now" for key in changed[:3]
            )
            raise ValueError(
                f"out={self.out} was begun with other settings or images ({listed}); choose another out=..."
            )
        return theirs

    def _described(self) -> dict[str, Any]:
        """The manifest before anything is encoded."""
        config, spec = self.config, self.codec.spec
        known = describe(config["tokenizer"], lambda: self.codec)
        train = self.parts["train"].source
        views = train.views if isinstance(train, Viewed) else None
        size = config["data"]["size"]
        return {
            "format": store.FORMAT,
            "tokenizer": {
                "name": known.name, "weights": known.weights, "digest": encoder_digest(known),
                "precision": config["tokenizer"].get("precision", "fp32"),
                "channels": spec.channels, "stride": spec.stride, "scale": known.scale, "shift": known.shift,
                "moments": ["mean", "logvar"][: self.planes // spec.channels],
            },
            "views": list(views.rules) if views else [str(size) if config["data"]["view"] == "square" else "native"],
            "patch_size": config["patch_size"],
            "max_image_tokens": views.max_tokens if views else config["data"]["max_tokens"],
            "mirrored": self.variants == 2,
            "dtype": config["dtype"],
            "shard_images": config["shard_images"],
            "splits": {
                split: {"images": len(np.unique(part.entries.images)), "entries": len(part.entries.images),
                        "fingerprint": part.source.fingerprint}
                for split, part in self.parts.items()
            },
            "source": {"root": config["data"].get("root"), "holdout": config["data"]["holdout"]},
            "classes": train.class_names,
            "statistics": None,
            "shards": None,
        }  # fmt: skip

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        text = json.dumps(manifest, indent=1)
        self._writing(store.MANIFEST, lambda file: write_whole(file, lambda temporary: temporary.write_text(text)))

    def _writing(self, name: str, write: Any) -> None:
        """Write a file of the store.

        Raises:
            ValueError: it cannot be written, because the disk is full or for another reason.
        """
        try:
            write(self.out / name)
        except OSError as error:
            raise ValueError(
                f"{self.out / name} cannot be written: {error}; complete shards are safe: make room and give the same "
                f"command again"
            ) from None

    def note(self, shard: Shard) -> dict[str, Any]:
        """What the metadata of a shard say of it."""
        return {"split": shard.split, "number": shard.number, "store": self.digest}

    def finished(self, shard: Shard) -> bool:
        """Whether a shard is there and intact, and its picture with it; what is damaged is reported and removed.

        Raises:
            ValueError: it is a shard of another store.
        """
        file = self.out / f"{shard.name}.safetensors"
        if not file.exists():
            return False
        try:
            note = store.verify(file).note
        except ValueError as error:
            print(f"warning: {error}", flush=True)
            file.unlink()
            return False
        if note != self.note(shard):
            raise ValueError(f"{file} belongs to another store; choose another out=...")
        return file.with_suffix(".png").exists()

    def run(self, shards: list[Shard], workers: int, encoded: Callable[[int], None]) -> None:
        """Encode shards one after another; `encoded` is called with the number of latents so far.

        Raises:
            ValueError: latents that are not finite, or a disk that is full.
        """
        if not shards:
            return
        pixels = self.config["tokenizer"].get("pixels_per_call", PIXELS)
        calls = [call for shard in shards for call in self.parts[shard.split].calls(shard, pixels)]
        filling: store.Filling | None = None
        count = 0
        encoded(count)
        for call, pictures in read_ahead(Calls(self.parts), calls, workers):
            shard = call.shard
            filling = filling or self._filling(shard)
            filling.put([entry - shard.first for entry in call.entries], self._encoded(call, pictures))
            count += len(call.entries)
            encoded(count)
            if not filling.missing:
                self._keep(shard, filling)
                filling = None

    def _filling(self, shard: Shard) -> store.Filling:
        """An empty shard."""
        part = self.parts[shard.split]
        images, rules, sizes = (column[shard.first : shard.end] for column in part.entries)
        columns = {"sizes": sizes // self.codec.spec.stride, "labels": part.labels[images], "images": images}
        names = [part.names[image] for image in np.unique(images)]
        channels = self.codec.spec.channels
        return store.Filling({**columns, "rules": rules}, names, channels, self.planes, self.variants, self.dtype)

    def _encoded(self, call: Call, pictures: Tensor) -> Tensor:
        """(B, variants, planes, h, w) moments in the stored dtype.

        Raises:
            ValueError: some are not finite.
        """
        images = normalised(pictures.to(self.device, non_blocking=True))
        both = torch.cat([images, images.flip(-1)]) if self.variants == 2 else images
        moments = _moments(self.codec, both).unflatten(0, (self.variants, len(images))).transpose(0, 1)
        values = moments.to(self.dtype).cpu()
        bad = (~values.isfinite()).flatten(1).any(dim=1).nonzero()
        if len(bad):
            part = self.parts[call.shard.split]
            name = part.names[int(part.entries.images[call.entries[int(bad[0])]])]
            raise ValueError(f"{name}: its latents are not finite in dtype={self.config['dtype']}; try another dtype=")
        return values

    def _keep(self, shard: Shard, filling: store.Filling) -> None:
        """Write a full shard, and before it its first image beside what is decoded of it."""
        latent = _normalised(self.codec, filling.first().to(self.device))
        image = self.parts[shard.split].read(shard.first).permute(1, 2, 0).numpy()
        picture = Image.fromarray(np.concatenate([image, to_uint8(self.codec.decode(latent)[0])], axis=1))
        save = functools.partial(picture.save, format="PNG")
        self._writing(f"{shard.name}.png", lambda file: write_whole(file, save))
        self._writing(f"{shard.name}.safetensors", lambda file: filling.write(file, self.note(shard)))

    def complete(self) -> bool:
        """Write the manifest if all shards are there; False if some are not."""
        files = [self.out / f"{shard.name}.safetensors" for shard in self.shards]
        try:
            indices = [store.read_index(file) for file in files]
        except (FileNotFoundError, ValueError):  # another process has still to write it, or to write it again
            return False
        lines = [store.manifest_line(file, index) for file, index in zip(files, indices, strict=True)]
        for split, expected in self.manifest["splits"].items():
            found = sum(line["entries"] for line in lines if line["file"].startswith(f"{split}-"))
            if found != expected["entries"]:
                raise ValueError(f"{self.out} holds {found:,} entries of {split}, not {expected['entries']:,}")
        train = [index.columns for index in indices if index.note["split"] == "train"]
        self._write_manifest({**self.manifest, "statistics": _statistics(train), "shards": lines})
        shutil.rmtree(self.out / PARTIAL, ignore_errors=True)
        return True


def encode(config: Mapping[str, Any], rank: int, ranks: int, device: torch.device) -> None:
    """Encode this process's share of a store; the last one to finish writes the manifest.

    Raises:
        FileNotFoundError: images, or the weights of the tokenizer, are missing.
        ValueError: see `Encoding`.
    """
    encoding = Encoding(config, device)
    mine = encoding.shards[rank::ranks]
    if rank == 0 and any(encoding.out.glob("*.safetensors")):
        print(f"checking the shards that are in {encoding.out}", flush=True)
    missing = [shard for shard in mine if not encoding.finished(shard)]
    counts = [sum(shard.end - shard.first for shard in shards) for shards in (encoding.shards, mine, missing)]
    total, own, left = counts
    if rank == 0:
        lines = encoding.parts["train"].source.report()
        lines += [f"  {len(part.names):,} of {split}" for split, part in encoding.parts.items()]
        there = f"{len(mine) - len(missing)} of {len(mine)} shards are there and intact"
        share = f" on each of {ranks} processes" if ranks > 1 else ""
        print(
            "\n".join([*lines, f"{encoding.out}: {total:,} latents in {len(encoding.shards)} shards; {there}{share}"])
        )
    workers = min(config["data"]["num_workers"], os.cpu_count() or 1)
    counter = Counter("latents", config["log_every"])

    def encoded(count: int) -> None:
        if rank == 0:  # the other processes are taken to be as far
            counter(round(total * (own - left + count) / own), total)

    encoding.run(missing, workers, encoded)
    if encoding.complete():
        print(f"done: {total:,} latents in {len(encoding.shards)} shards, {encoding.out / store.MANIFEST}", flush=True)


def run_group(command: list[str], processes: int) -> bool:
    """Run a command in several processes, which know their places as those of torchrun do; False if one failed.

    What several of them say on standard error is said once.
    """
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))}
    places = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(processes)} for i in range(processes)]
    group = [
        subprocess.Popen(command, env=threads | os.environ | place, stderr=subprocess.PIPE, text=True)
        for place in places
    ]
    said: set[str] = set()

    def relay(lines: Iterable[str]) -> None:
        for line in lines:
            if line not in said:
                said.add(line)
                print(line, end="", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(relay, [cast(IO[str], process.stderr) for process in group]))
    codes = [process.wait() for process in group]
    return not any(codes)


def _moments(codec: Tokenizer, images: Tensor) -> Tensor:
    """(B, 3, height, width) -> (B, planes, h, w); tokenizers that are no network do not scale."""
    return codec.moments(images) if isinstance(codec, Autoencoder) else codec.encode(images)


def _normalised(codec: Tokenizer, moments: Tensor) -> Tensor:
    return codec.normalise(moments) if isinstance(codec, Autoencoder) else moments


def _statistics(shards: list[dict[str, np.ndarray]]) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel of the unscaled means."""
    sums = sum((shard["sums"] for shard in shards), start=np.zeros_like(shards[0]["sums"]))
    count = sum(int(shard["sizes"].astype(np.int64).prod(axis=1).sum()) for shard in shards)
    mean, square = sums / count
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist()}


def _fixed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The lines of a manifest that say what its shards are."""
    begun = {**manifest, "statistics": None, "shards": None}
    return {key: value for key, value in flatten(begun).items() if key not in FREE}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
