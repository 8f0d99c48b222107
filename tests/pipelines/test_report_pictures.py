"""The pictures of a report."""

from __future__ import annotations

import numpy as np

from pipelines.report_pictures import rows_of_all_classes


def test_rows_of_all_classes_from_sorted_labels_take_turns() -> None:
    labels = np.repeat([0, 1, 2], [4, 1, 3])
    assert rows_of_all_classes(labels, count=5).tolist() == [0, 4, 5, 1, 6]
    assert len(rows_of_all_classes(labels, count=50)) == len(labels)
