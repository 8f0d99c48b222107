"""From a bundle and a file of labels to the best classifier of several, as one ONNX file that is served.

Rows and their ids (:mod:`~pipelines.finetuning.rows`) meet labels (:mod:`pipelines.label_files`); classifiers
(:mod:`~pipelines.finetuning.contenders`) are judged on labels that are hidden from them
(:mod:`~pipelines.finetuning.judging`); :mod:`~pipelines.finetuning.job` ships the best.
"""
