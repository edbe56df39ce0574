"""Where the processes of a run find one another, also when torchrun starts them again after one has died.

torchrun (2.4 to at least 2.13) keeps one store for all its starts, and what the dead ones left there is taken for the
addresses of the living, which then cannot reach one another (pytorch issues 135712, 167288). So each start agrees on a
part of the store of its own. It is not told apart by torchrun's count of its starts, which machines may count
differently.
"""

import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

SCHEME = "one-start"
POLL = 0.05  # seconds


@cache
def init_method() -> str:
    """What `init_process_group` takes under this name."""
    register_rendezvous_handler(SCHEME, _meet)
    return f"{SCHEME}://"


def _meet(url: str, timeout: timedelta, **more: Any) -> Iterator[tuple[Store, int, int]]:
    store, rank, world = next(rendezvous(url.replace(SCHEME, "env", 1), timeout=timeout, **more))
    yield PrefixStore(agree(store, rank, world), store), rank, world
    raise RuntimeError("the processes have met, and they meet only once")


def agree(store: Store, rank: int, world: int) -> str:
    """A word that is the same on all processes that call this together, and new, whatever earlier ones left behind."""
    word = secrets.token_hex(8)
    if rank > 0:
        # Answered under a name that none had before: the answer can be to nobody else.
        store.set(f"arrived/{rank}", word)
        common = store.get(f"answer/{word}").decode()
        store.set(f"agreed/{common}/{rank}", "")
        return common
    missing = list(range(1, world))
    while missing:
        for other in missing:
            arrived = store.get(f"arrived/{other}").decode()  # may be of one that is dead by now
            store.set(f"answer/{arrived}", word)
        time.sleep(POLL)
        missing = [other for other in missing if not store.check([f"agreed/{word}/{other}"])]
    return word
