"""From a bundle and a file of labels to the best classifier of several, as one ONNX file that is served.

Rows and their ids (:mod:`~pipelines.finetuning.rows`) meet labels (:mod:`~pipelines.finetuning.labels`); classifiers
(:mod:`~pipelines.finetuning.contenders`) are judged on labels that are hidden from them
(:mod:`~pipelines.finetuning.judging`), and the best is exported (:mod:`~pipelines.finetuning.comparison`) and written
beside what was found (:mod:`~pipelines.finetuning.results`). :mod:`~pipelines.finetuning.job` does it with the files
of a command line, :mod:`~pipelines.finetuning.stage` with those of a job.
"""
