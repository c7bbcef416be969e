"""Backend ``tiled``: the logits one tile at a time, in plain torch, on any device."""

from contrastive_kit.ops.registered import (
    LogSumExp,
    SoftplusSum,
    SoftplusTotal,
    register_logsumexp,
    register_softplus_sum,
    register_softplus_total,
)
from contrastive_kit.ops.tiled import logsumexp as _logsumexp
from contrastive_kit.ops.tiled import softplus as _softplus
from contrastive_kit.ops.tiled.pairs import pair_loss as pair_loss
from contrastive_kit.ops.tiled.tiles import new_tiles

logsumexp: LogSumExp = register_logsumexp(
    "tiled", _logsumexp.forward, _logsumexp.backward, new_tiles
)
softplus_sum: SoftplusSum = register_softplus_sum("tiled", _softplus.forward, _softplus.backward)
softplus_total: SoftplusTotal = register_softplus_total("tiled", _softplus.total)
