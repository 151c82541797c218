"""`build_loader(config, spec)` builds the loader of one split for one rank, with any backend."""

import dataclasses

from pipelines.config import DataConfig
from pipelines.loader import Loader
from pipelines.shards.order import choose_order
from pipelines.shards.shard_set import ShardSet
from pipelines.spec import LoaderSpec, with_index

__all__ = ["LoaderSpec", "build_loader"]


def build_loader(config: DataConfig, spec: LoaderSpec, *, shards: ShardSet | None = None) -> Loader:
    """Builds the loader of one split for one rank.

    Args:
        config: Names the shards, the backend and the augmentation.
        spec: Describes the batches.
        shards: The open shards of the split, if the caller has them already.

    Raises:
        ValueError: The shards do not exist, or they hold too few samples for a batch.
    """
    shards = shards or config.open_shards(spec.split)
    spec = dataclasses.replace(spec, num_classes=spec.num_classes or shards.num_classes(), device=with_index(spec.device))
    # Each backend imports heavy libraries that the others do not need.
    if config.backend == "synthetic":
        from pipelines.synthetic import SyntheticLoader

        return SyntheticLoader(shards.num_samples, spec)
    deal = spec.deal(choose_order(config, shards, spec.is_train, spec.seed))
    if config.backend == "pillow":
        from pipelines.pillow import CUDAPrefetcher

        return CUDAPrefetcher(shards, config, spec, deal)
    from pipelines.dali.loader import DALILoader

    return DALILoader(shards, config, spec, deal)
