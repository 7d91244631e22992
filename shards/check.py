"""Are shards whole, and does every pair in them decode? For `prepare_data.py check`."""

import hashlib
import tempfile

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from distributed import hidden_bar
from sets import Facts, inspect_pair
from shards.addresses import WEB, Files, shown
from shards.index import Shard
from shards.pairs import PairsInShards
from utils import UserError

PIECE = 2**20  # bytes read at once


def inspect_shards(pairs: PairsInShards, workers: int = 0) -> tuple[list[Facts], dict[str, str]]:
    """Read every shard once, compare it with its index, decode its pairs -> facts in order, {broken shard: why}."""
    loader = DataLoader(_Inspected(pairs), batch_size=None, num_workers=workers)
    progress = {"desc": "reading every shard", "leave": False, "unit": "shard", "disable": hidden_bar()}
    found = [*tqdm(loader, total=len(pairs.index.shards), **progress)]
    broken = {shard.name: why for shard, (_, why) in zip(pairs.index.shards, found, strict=True) if why}
    return [fact for facts, _ in found for fact in facts], broken


class _Inspected(Dataset):
    """Item s: the facts of the pairs that are in shard s, and what is wrong with the shard."""

    def __init__(self, pairs: PairsInShards) -> None:
        self.pairs = pairs
        self.ends = np.concatenate([[0], np.cumsum(pairs.sizes())])

    def __len__(self) -> int:
        return len(self.pairs.index.shards)

    def __getitem__(self, number: int) -> tuple[list[Facts], str]:
        index, rows = self.pairs.index, self.pairs.rows[self.ends[number] : self.ends[number + 1]]
        shard = index.shards[number]
        with tempfile.NamedTemporaryFile() as copy:
            try:
                why = compare(shard, copy if shard.address.startswith(WEB) else None)
            except (UserError, OSError) as error:
                why = str(error)
                return [Facts(why, False, np.nan, "")] * len(rows), why
            if shard.address.startswith(WEB):  # so that it is fetched once
                index = index._replace(shards=[one._replace(address=copy.name) for one in index.shards])
            facts = [inspect_pair(pair) for pair in PairsInShards(index, rows)]
            return [fact._replace(error=fact.error.replace(copy.name, shown(shard.address))) for fact in facts], why


def compare(shard: Shard, copy=None) -> str:
    """What is wrong with a shard, by its length and its checksum; copy: a file to keep its bytes in."""
    digest, size = hashlib.sha256(), 0
    if copy is None:
        with open(shard.address, "rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                size += len(piece)
    else:
        for piece in Files().stream(shard.address):
            digest.update(piece)
            size += len(piece)
            copy.write(piece)
        copy.flush()
    if size != shard.bytes:
        why = f"{size} bytes, its index says {shard.bytes}"
    elif shard.sha256 and digest.hexdigest() != shard.sha256:
        why = "another sha256 than its index says"
    else:
        return ""
    return f"the shard {shown(shard.address)} has {why}: write or copy it again"
