"""iREPA on JiT: its loss with that of the alignment, whose tokens have lost the class tokens."""

from __future__ import annotations

from dataclasses import replace

import torch

from genfound.checkpoints.official import projectors
from genfound.rng import Rng
from genfound.runtime import checkpoint_io
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.jit import SOURCE, DrawnJiT, Draws, Fixture, dense, grid_of, objective_of, official, outwards
from tests.golden.adapters.repa import alignment_of, normalised, similarity
from tests.golden.fill import inputs, parameters


@adapter("irepa", "loss_jit")
def loss(fixture: Fixture) -> Results:
    """The whole loss, the projection loss, projections and gradients."""
    config, given = fixture["config"], inputs(fixture)
    asked, arguments = config["model"], config["alignment"]
    net = official(fixture, asked).train()
    alignment = alignment_of(arguments, asked["hidden_size"])
    checkpoint_io.load_strict(alignment, projectors.from_official(parameters(fixture)), SOURCE)
    drop = config["loss"]["label_drop_prob"]
    module = DrawnJiT(net, objective_of(config["loss"]), {}, drop, 0, 1, alignment)
    module.draws, rows = Draws(), grid_of(asked)[0]
    features = tuple(normalised(given[f"f.{k}"], arguments, rows) for k in range(len(arguments["z_dims"])))
    batch = replace(dense(net, given["x"], given["y"]), features=features)
    projected: dict[str, torch.Tensor] = {}
    for k, projector in enumerate(alignment.projectors):
        projector.register_forward_hook(lambda m, i, out, k=k: projected.update({f"projected.{k}": out}))
    losses = module.evaluate(batch, Rng(0))
    losses.total.mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    moved = outwards(gradients, asked)
    moved |= projectors.to_official({n: p.grad for n, p in alignment.named_parameters() if p.grad is not None}, "jit")
    cosine = similarity(losses.terms["alignment"], alignment)
    return {
        "loss": losses.terms["objective"].mean() + arguments["proj_coeff"] * cosine,
        "projection_loss": cosine,
        **projected,
        **{f"gradients.{key}": value for key, value in moved.items()},
    }
