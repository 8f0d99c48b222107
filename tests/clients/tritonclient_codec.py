"""What Triton's client writes and reads, without a server: python tritonclient_codec.py write|read FOLDER.

``write`` turns every ``NAME.npy`` into the body of a request, ``NAME.body``, and puts the length of its JSON into
``NAME.length``; a name that ends in "binary" says how. ``read`` turns ``answer.body``, with its ``answer.length``, into
``OUTPUT.read.npy`` for every output.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferResult
from tritonclient.utils import np_to_triton_dtype

verb, folder = sys.argv[1], Path(sys.argv[2])

if verb == "write":
    for path in folder.glob("*.npy"):
        array = np.load(path)
        binary = path.stem.endswith("binary")
        if array.dtype.kind == "S":
            array = array.astype(object)
        tensor = InferInput("images" if array.dtype == object else "rows", array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array, binary_data=binary)
        body, length = InferenceServerClient.generate_request_body([tensor], request_id=path.stem)
        path.with_suffix(".body").write_bytes(body)
        path.with_suffix(".length").write_text("" if length is None else str(length))
else:
    length = int((folder / "answer.length").read_text())
    answer = InferResult.from_response_body((folder / "answer.body").read_bytes(), header_length=length)
    for output in answer.get_response()["outputs"]:
        np.save(folder / f"{output['name']}.read.npy", answer.as_numpy(output["name"]))
