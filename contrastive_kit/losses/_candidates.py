"""What InfoNCE compares the pairs of a batch with, and the checks of it."""

from typing import NamedTuple

from torch import Tensor

from contrastive_kit._checks import (
    check_alike,
    check_dense,
    check_device,
    check_embeddings,
    check_ids,
    check_ids_of,
    check_reverse_mode,
)
from contrastive_kit.losses._common import of_each_anchor
from contrastive_kit.losses._negatives import (
    Beside,
    InTiles,
    Negatives,
    PerQuery,
    Together,
    check_own_keys,
    together,
)
from contrastive_kit.losses._options import Options
from contrastive_kit.ops import Exclusion, scaled_unit_rows


class AnchorPairs(NamedTuple):
    """Rows of queries and keys as anchors, and what they are compared with if not each other.

    That is the rows of all processes, or those without the temperatures of the anchors.
    """

    queries: Tensor
    keys: Tensor
    all_keys: Tensor | None = None
    all_queries: Tensor | None = None

    def among(self, all_keys: Tensor, all_queries: Tensor | None = None) -> "AnchorPairs":
        """The same anchors, compared with these."""
        return AnchorPairs(self.queries, self.keys, all_keys, all_queries)


def rows_of_pairs(
    query: Tensor, key: Tensor, negatives: Tensor | None, temperature: float | Tensor
) -> tuple[AnchorPairs, Tensor, Tensor, Tensor | None]:
    """The anchors; and as candidates the queries, the keys, and the negatives, if there are any.

    A temperature of each anchor divides its row alone; one for all divides both by its root.
    """
    each = of_each_anchor(temperature)
    scale = temperature if each is None else 1.0
    # Normalized apart, so that a key or a queue without gradient costs none.
    queries = scaled_unit_rows((query,), scale)[0]
    keys = scaled_unit_rows((key,), scale)[0]
    given = None if negatives is None else scaled_unit_rows((negatives,), scale)[0]
    if each is None:
        return AnchorPairs(queries, keys), queries, keys, given
    scales = each.to(queries.dtype).reciprocal()[:, None]
    return AnchorPairs(queries * scales, keys * scales, keys, queries), queries, keys, given


def of_batch(
    asked: InTiles, pairs: AnchorPairs, options: Options, others: list[Negatives]
) -> Negatives:
    """The negatives of the batch, and ``others`` of the queries; queries first, then keys."""
    queries, keys, all_keys, all_queries = pairs
    statistics = asked.problem.statistics
    of_queries: list[Negatives] = [*others]
    of_keys: list[Negatives] = []
    if options.query_negatives:
        of_queries.append(asked.among(queries, all_queries))
    if options.key_negatives:
        (of_keys if options.symmetric else of_queries).append(asked.among(keys, all_keys))
    if options.symmetric and all_keys is None:
        limits = asked.problem.limits
        # The positive of a query and that of its key are one pair.
        of_both = None if limits is None else limits.repeat(2)
        clip = asked.among(queries, keys, both=True, limits=of_both)
        if not of_queries and not of_keys:
            return clip
        sides = (together(of_queries, queries, statistics), together(of_keys, keys, statistics))
        return Together((clip, Beside(sides)))
    of_queries.append(asked.among(queries, keys if all_keys is None else all_keys))
    if not options.symmetric:
        return together(of_queries, queries, statistics)
    of_keys.append(asked.among(keys, all_queries))
    return Beside((together(of_queries, queries, statistics), together(of_keys, keys, statistics)))


def of_given(asked: InTiles, ids: Tensor | None, negative_ids: Tensor | None) -> list[Negatives]:
    """The negatives that the caller gave, the columns of ``asked``: shared, or per query."""
    problem, rows = asked.problem, asked.problem.keys()
    if rows.ndim == 3:
        left_out = None if negative_ids is None or ids is None else negative_ids == ids[:, None]
        return [PerQuery.of(problem.q, rows, left_out, problem.statistics, problem.limits)]
    if rows.shape[0] == 0:
        return []
    rule = Exclusion() if negative_ids is None else Exclusion(0, ids, negative_ids)
    return [asked.among(problem.q, rows, exclusion=rule)]


def in_batch(options: Options, negatives: Tensor | None) -> bool:
    """Whether the pairs of the batch are negatives of each other."""
    given = options.in_batch_negatives
    return negatives is None if given is None else given


def check_pairs(query: Tensor, key: Tensor, ids: Tensor | None) -> None:
    check_embeddings("query", query)
    check_embeddings("key", key)
    check_alike("key", key, "query", query)
    check_reverse_mode("query", query)
    check_reverse_mode("key", key)
    if ids is not None:
        check_ids("ids", ids, query.shape[0], "query", query)


def check_batch_alone(
    query: Tensor, options: Options, negative_ids: Tensor | None, least: int
) -> None:
    if options.in_batch_negatives is False:
        raise ValueError("in_batch_negatives=False needs negatives, or there are none; got None")
    if negative_ids is not None:
        raise ValueError("negative_ids are those of negatives, which are None; omit them")
    if query.shape[0] < least:
        raise ValueError(
            "query must have at least 2 rows where no negatives are given, or there are none; "
            f"got {query.shape[0]}"
        )


def check_negatives(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    ids: Tensor | None,
    negative_ids: Tensor | None,
    options: Options,
) -> None:
    if not in_batch(options, negatives):
        _check_without_batch(options, ids, negative_ids)
    n, d = query.shape
    if isinstance(negatives, Tensor):
        check_dense("negatives", negatives)
    if isinstance(negatives, Tensor) and negatives.ndim == 3:
        check_embeddings("negatives", negatives, ndim=3)
        if (negatives.shape[0], negatives.shape[2]) != (n, d):
            raise ValueError(
                f"negatives must have shape ({n}, K, {d}) to match query, "
                f"got {tuple(negatives.shape)}"
            )
    else:
        if not (isinstance(negatives, Tensor) and negatives.shape == (0, d)):
            check_embeddings("negatives", negatives)
        if negatives.shape[1] != d:
            raise ValueError(
                f"negatives must have shape (K, {d}) to match query, got {tuple(negatives.shape)}"
            )
    check_device("negatives", negatives, "query", query)
    check_reverse_mode("negatives", negatives)
    check_own_keys(key, negatives)
    if negative_ids is not None:
        if ids is None:
            raise ValueError("negative_ids are compared with ids, which are None; give both")
        check_ids_of("negative_ids", negative_ids, negatives.shape[:-1], "negatives", negatives)


def _check_without_batch(options: Options, ids: Tensor | None, negative_ids: Tensor | None) -> None:
    """Raise for what only the negatives of the batch could answer."""
    if options.symmetric:
        raise ValueError(
            "symmetric=True with negatives needs in_batch_negatives=True: keys have no negatives "
            "of their own"
        )
    for name in ("query_negatives", "key_negatives"):
        if getattr(options, name):
            raise ValueError(
                f"{name}=True takes negatives from the batch; with negatives given, set "
                "in_batch_negatives=True"
            )
    if options.gather_distributed:
        raise ValueError(
            "gather_distributed=True takes the keys of other processes as negatives; with "
            "negatives given, set in_batch_negatives=True, or leave it False and let NegativeQueue "
            "gather"
        )
    if ids is not None and negative_ids is None:
        raise ValueError(
            "ids tell which keys are no negatives; with negatives given, omit ids, give "
            "negative_ids too, or set in_batch_negatives=True"
        )
