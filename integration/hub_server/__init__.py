"""A Hub on 127.0.0.1, written from the source of huggingface_hub 2.4 and stricter than it.

It verifies the sha256 and size of everything it is given, keeps commits unchanged for ever, wants the token
where the Hub wants it and nowhere else, and answers 501 to what it does not know. Whatever a client should
not have done is kept in `violations`, so that a test can fail. Data goes over LFS, or over xet, for which the
client's own hf_xet writes to a folder through its `local://` scheme. `faults` make it fail as the Hub may.

    python -m integration.hub_server --port 8899
"""

from .api import HubServer
from .http import TOKEN, USER, Fault
from .store import Entry

__all__ = ["TOKEN", "USER", "Entry", "Fault", "HubServer"]
