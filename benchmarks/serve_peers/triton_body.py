"""The bytes that Triton's client sends: ``python triton_body.py ROWS.npy BODY``; prints the length of the JSON."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput

rows = np.load(sys.argv[1])
tensor = InferInput("rows", rows.shape, "UINT8")
tensor.set_data_from_numpy(rows, binary_data=True)
body, length = InferenceServerClient.generate_request_body([tensor])
Path(sys.argv[2]).write_bytes(body)
print(length)
