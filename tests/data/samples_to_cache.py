"""A data set for the tests of caches."""

import numpy as np
import torch

from torsh_data._sample_layout import Layout, describe


class Counted:
    """Samples of every kind and of ragged sizes, with a count of reads."""

    def __init__(self, rows=20, salt=0):
        self.rows, self.salt, self.reads = rows, salt, []
        self.fingerprint = f"counted-{rows}-{salt}"

    def __len__(self):
        return self.rows

    def __getitem__(self, n):
        self.reads.append(n)
        return {
            "image": torch.full((3, 2 + n % 4, 5), (n + self.salt) % 256, dtype=torch.uint8),
            "boxes": (np.arange(n % 3 * 4, dtype=np.float32).reshape(-1, 4), torch.tensor(n)),
            "text": "é" * n,
            "raw": bytes([n % 256]) * n,
            "half": torch.full((n % 2,), n, dtype=torch.bfloat16),
            "more": [n, n / 3, n % 2 == 0, None, np.float32(n)],
        }


def equal(a, b):
    layout = Layout(describe(a))
    one, two = layout.encode(a), layout.encode(b)
    return one[0] == two[0] and list(map(bytes, one[1])) == list(map(bytes, two[1]))
