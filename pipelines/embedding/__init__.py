"""A data set of any size in, its features as a Parquet data set out.

The input is cut into parts (:mod:`~pipelines.embedding.parts`), each of which one actor of Ray Data reads, embeds and
writes by itself: rows never pass through Ray's object store, and a part's file, which appears whole or not at all, is
its checkpoint.
"""
