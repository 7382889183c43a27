"""Encoding once: images -> a latent store, resumable after every shard, on any number of processes.

A shard holds the latents of so many consecutive images. It is a pure function of the images and the tokenizer,
because images are encoded in batches of one size that never cross its border; so a process may be killed at any
moment, shards may be shared out over any number of them, and the store is the same. Rank r encodes every
`ranks`-th shard from r on; whoever finds all of them complete writes the manifest. Nobody waits for anybody.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genfound import build
from genfound.alignment import from_config, stored
from genfound.config.checks import integer, one_of
from genfound.config.command_line import explain_oom
from genfound.config.targets import trusted
from genfound.data.images.base import PictureSource
from genfound.data.images.index import ImageFiles
from genfound.data.images.names import shown
from genfound.data.images.pixels import normalised, to_uint8
from genfound.data.latents import store
from genfound.data.latents.manifest import FORMAT, MANIFEST
from genfound.data.latents.stored_tokenizer import describe, encoder_digest
from genfound.data.packing.prefetch import read_ahead
from genfound.encoding.shard_plan import LARGEST, EncodeBatch, EncodeDataset, Shard, Split
from genfound.encoding.store_writer import StoreWriter
from genfound.runtime import devices, launch, processes
from genfound.runtime.files import atomic_write, check_folder
from genfound.runtime.progress import ProgressCounter
from genfound.text.from_config import check_captions, fetch_text_encoder, text_encoder, text_options
from genfound.tokenizers import Tokenizer
from genfound.tokenizers.autoencoder import Autoencoder

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MOST_NAMED = 10

CAPTIONS = 64
"""That are encoded together."""

PIXELS = 2**20
"""Of a batch, for tokenizers that do not say."""


class Encoding:
    """A store in the making, of the resolved configuration of `genfound.encode`, by a tokenizer on a device."""

    def __init__(self, config: Mapping[str, Any], device: torch.device) -> None:
        if build.reads_latents(config):
            raise ValueError("data: only images can be encoded; choose data=image_folder or data=imagenet_native")
        for key in ("dtype", "features_dtype"):
            one_of(key, config[key], DTYPES)
        for key in ("patch_size", "shard_images"):
            integer(key, config[key], 1)
        self.config, self.device = config, device
        self.dtype, self.features_dtype = DTYPES[config["dtype"]], DTYPES[config["features_dtype"]]
        self.variants = 2 if config["data"]["flip"] else 1
        self.codec = build.tokenizer(config)
        like = {**config, "layout": {"name": "packed"}, "model": {"patch_size": config["patch_size"]}}
        sources = {split: build.source(like, self.codec.spec, split) for split in ("train", "val")}
        self.parts = {split: Split.of(cast(PictureSource, source)) for split, source in sources.items()}
        self.pixels = config["tokenizer"].get("pixels_per_call", PIXELS)
        side = self.codec.spec.stride * config["patch_size"]
        self.planes = _moments(self.codec, torch.zeros(1, 3, side, side, device=device)).shape[1]
        self.side, self.teachers = side, from_config.teachers(config, sources["train"])
        if self.teachers is not None:
            self.teachers.check_source(sources["train"])
        self.widths = from_config.widths(config)
        self.text, most = text_encoder(config), config["shard_images"]
        check_captions(config, sources["train"])
        if self.text is not None:
            most = min(most, max(LARGEST // (self.text.tokens * self.text.width * self.features_dtype.itemsize), 1))
        if taken := [name for name in store.TEXT if name in self.widths]:
            raise ValueError(f"alignment.teachers.{taken[0]}: a store has captions of this name; give another one")
        weight = self.variants * self.planes * self.dtype.itemsize / self.codec.spec.stride**2
        weight += self.variants * sum(self.widths.values()) * self.features_dtype.itemsize / side**2
        every = [part.shards(split, most, weight) for split, part in self.parts.items()]
        self.shards = [shard for shards in every for shard in shards]
        self.place = StoreWriter(Path(config["out"]), self._described())

    def _described(self) -> dict[str, Any]:
        """The manifest before anything is encoded."""
        config, spec = self.config, self.codec.spec
        known = describe(config["tokenizer"], lambda: self.codec, trust=trusted(config))
        train = self.parts["train"].source
        views = train.views if isinstance(train, ImageFiles) else None
        size = config["data"]["size"]
        return {
            "format": FORMAT,
            "tokenizer": {
                "name": known.name, "weights": known.weights, "digest": encoder_digest(known),
                "precision": config["tokenizer"].get("precision", "fp32"), "pixels_per_call": self.pixels,
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
            **self._seen(),
            "statistics": None,
            "shards": None,
        }  # fmt: skip

    def _seen(self) -> dict[str, Any]:
        """What the manifest says of teachers and of the text encoder, if there are any."""
        found, kept, trust = dict[str, Any](), {"dtype": self.config["features_dtype"]}, trusted(self.config)
        if self.teachers is not None:
            named = from_config.named_teachers(self.config)
            found["features"] = {**stored.described(named, trust, self.side, self.teachers.pixels), **kept}
        if self.text is not None:
            options = text_options(self.config)
            digest = stored.weights_digest("text_encoder", options, trust)
            found["text"] = {"encoder": {**options, "digest": digest}, **kept}
        return found

    def run(self, shards: list[Shard], workers: int, encoded: Callable[[int], None]) -> None:
        """Encode shards one after another; `encoded` is called with the number of latents so far."""
        if not shards:
            return
        batches = [batch for shard in shards for batch in self.parts[shard.split].batches(shard, self.pixels)]
        filling: store.ShardWriter | None = None
        count = 0
        encoded(count)
        pixels = self.teachers and self.teachers.pixels
        dataset = EncodeDataset(self.parts, (pixels, self.side) if pixels else None)
        for batch, pictures, replaced in read_ahead(dataset, batches, workers):
            shard, entries = batch
            filling = filling or self._filling(shard)
            moments, features = self._encoded(batch, pictures[0]), self._features(*pictures)
            filling.put([entry - shard.first for entry in entries], moments, features)
            filling.replaced |= replaced
            count += len(entries)
            encoded(count)
            if not filling.missing:
                self._keep(shard, filling)
                filling = None

    def _filling(self, shard: Shard) -> store.ShardWriter:
        part, (channels, stride) = self.parts[shard.split], self.codec.spec
        images, rules, sizes = (column[shard.first : shard.end] for column in part.entries)
        columns = {"sizes": sizes // stride, "labels": part.labels[images], "images": images, "rules": rules}
        names = [part.name(image) for image in np.unique(images).tolist()]
        grid = {"features": self.widths, "patch_size": self.config["patch_size"]}
        return store.ShardWriter(
            columns, names, channels, self.planes, self.variants, self.dtype, **grid,
            features_dtype=self.features_dtype, captions=self._captions(part, range(shard.first, shard.end)),
        )  # fmt: skip

    def _captions(self, part: Split, entries: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Of each entry what the text encoder makes of its caption, in the stored dtype, and the bytes of that."""
        if self.text is None:
            return []
        captions, found = [part.caption(entry) for entry in entries], list[tuple[Tensor, Tensor]]()
        for begin in range(0, len(captions), CAPTIONS):
            some = captions[begin : begin + CAPTIONS]
            for caption, made in zip(some, self.text(some, self.device), strict=True):
                values = made.to(self.features_dtype).cpu()
                if not values.isfinite().all():
                    way = "try features_dtype=bf16" + (" and another out=" if self.place.begun else "")
                    raise ValueError(f"the text of {caption[:60]!r} is not finite in features_dtype=...; {way}")
                found.append((values, torch.frombuffer(bytearray(caption.encode()), dtype=torch.uint8)))
        return found

    def _features(self, pictures: Tensor, *seen: Tensor) -> list[Tensor]:
        """What each teacher sees, (B, variants, Z, rows, columns) in the stored dtype."""
        if self.teachers is None:
            return []
        rows, columns = (side // self.side for side in pictures.shape[2:])
        images = (seen or (pictures,))[0].to(self.device, non_blocking=True)
        both = [self.teachers.maps(own, rows, columns) for own in (images, images.flip(-1))[: self.variants]]
        return [torch.stack(same, dim=1).to(self.features_dtype).cpu() for same in zip(*both, strict=True)]

    def _encoded(self, batch: EncodeBatch, pictures: Tensor) -> Tensor:
        """(B, variants, planes, h, w) moments in the stored dtype."""
        images = normalised(pictures.to(self.device, non_blocking=True))
        both = torch.cat([images, images.flip(-1)]) if self.variants == 2 else images
        moments = _moments(self.codec, both).unflatten(0, (self.variants, len(images))).transpose(0, 1)
        values = moments.to(self.dtype).cpu()
        bad = (~values.isfinite()).flatten(1).any(dim=1).nonzero()
        if len(bad):
            part = self.parts[batch.shard.split]
            name = shown(part.name(int(part.entries.images[batch.entries[int(bad[0])]])))
            way = "try another dtype=" + (" and another out=" if self.place.begun else "")
            raise ValueError(f"{name}: its latents are not finite in dtype={self.config['dtype']}; {way}")
        return values

    def _keep(self, shard: Shard, filling: store.ShardWriter) -> None:
        """Write a full shard, and before it its first image beside what is decoded of it."""
        moments, codec = filling.first().to(self.device), self.codec
        latent = codec.normalise(moments) if isinstance(codec, Autoencoder) else moments
        image = self.parts[shard.split].read(shard.first).permute(1, 2, 0).numpy()
        picture = Image.fromarray(np.concatenate([image, to_uint8(codec.decode(latent)[0])], axis=1))
        file = self.place.file(shard)
        beside = file.with_suffix(".png")
        self.place.write(lambda: atomic_write(beside, lambda temporary: picture.save(temporary, format="PNG")), beside)
        self.place.write(lambda: filling.write(file, self.place.note(shard)), file)


def encode(config: Mapping[str, Any], rank: int, ranks: int, device: torch.device) -> None:
    """Encode this process's share of a store; the last one to finish writes the manifest."""
    encoding = Encoding(config, device)
    place = encoding.place
    mine = encoding.shards[rank::ranks]
    if rank == 0 and place.begun:
        print(f"checking the shards that are in {place.out}", flush=True)
    missing = [shard for shard in mine if not place.finished(shard)]
    total, own, left = (sum(s.end - s.first for s in shards) for shards in (encoding.shards, mine, missing))
    if rank == 0:
        lines = encoding.parts["train"].source.report()
        lines += [f"  {len(part.labels):,} of {split}" for split, part in encoding.parts.items()]
        there = f"{len(mine) - len(missing)} of {len(mine)} shards are there and intact"
        share = f" on each of {ranks} processes" if ranks > 1 else ""
        print("\n".join([*lines, f"{place.out}: {total:,} latents in {len(encoding.shards)} shards; {there}{share}"]))
    workers = min(config["data"]["num_workers"], os.cpu_count() or 1)
    counter = ProgressCounter("latents", config["log_every"])

    def encoded(count: int) -> None:
        if rank == 0:  # the other processes are taken to be as far
            counter(round(total * (own - left + count) / own), total)

    encoding.run(missing, workers, encoded)
    completed = place.complete(encoding.shards)
    if completed or (completed is False and place.was_complete and (missing or rank == 0)):
        done = f"done: {total:,} latents in {len(encoding.shards)} shards, {place.out / MANIFEST}"
        print("\n".join([*_replacements(place.replaced), done]), flush=True)


def encode_on_devices(config: Mapping[str, Any]) -> None:
    """Encode this machine's share of a store, on all of its devices."""
    integer("devices", config["devices"], 1, or_null=True)
    integer("num_nodes", config["num_nodes"], 1)
    integer("node_rank", config["node_rank"], 0)
    node, nodes = config["node_rank"], config["num_nodes"]
    if node >= nodes:
        raise ValueError(f"node_rank={node} must be less than num_nodes={nodes}")
    check_folder("out", Path(config["out"]))
    device = devices.device(config["accelerator"])
    count = config["devices"] or (torch.cuda.device_count() if device.type == "cuda" else 1)
    from_config.fetch_teachers(config)
    fetch_text_encoder(config)
    if count == 1:
        processes.tune_malloc()
        return encode(config, node, nodes, device)
    build.fetch_tokenizer(config)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // count, 1))
    launch.launch("genfound.encoding.encode", config, count, OMP_NUM_THREADS=threads)


def _replacements(replaced: Mapping[str, str]) -> list[str]:
    if not replaced:
        return []
    listed = [f"  {shown(name)}: {shown(other)} is in its place" for name, other in [*replaced.items()][:MOST_NAMED]]
    more = [f"  and {len(replaced) - MOST_NAMED:,} more"] if len(replaced) > MOST_NAMED else []
    head = f"warning: {len(replaced):,} images could not be read, and the store has others of their class instead"
    return [f"{head} (data.check=full leaves them out):", *listed, *more]


def _moments(codec: Tokenizer, images: Tensor) -> Tensor:
    """(B, 3, height, width) -> (B, planes, h, w); tokenizers that are no network do not scale."""
    return codec.moments(images) if isinstance(codec, Autoencoder) else codec.encode(images)


def _worker(request: Path) -> None:
    """One process of a machine: `python -m genfound.encoding.encode REQUEST_FILE`."""
    with launch.reporting(), explain_oom("encode"):
        rank, ranks, local_rank = processes.rank_info()
        config = json.loads(request.read_text())
        processes.tune_malloc()
        device = devices.device(config["accelerator"], local_rank)
        encode(config, config["node_rank"] * ranks + rank, config["num_nodes"] * ranks, device)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
