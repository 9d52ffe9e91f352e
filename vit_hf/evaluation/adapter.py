"""The evaluator of the `evaluate` library under transformers 5.

What breaks there (evaluate 0.4.6): `prepare_pipeline` asks `isinstance(given, transformers.TFPreTrainedModel)`, a name that
transformers 5 no longer has, so that a ready pipeline ends in an AttributeError; a model's id, folder or object still goes
through. Beside that, a metric's name is looked up on the Hub, and the pipeline's labels are texts where the set's are
numbers.
"""

from typing import Any

import evaluate
from evaluate.evaluator.image_classification import ImageClassificationEvaluator

from vit_hf.evaluation.evaluate import METRICS


class ImageClassification(ImageClassificationEvaluator):
    """`evaluate.evaluator("image-classification")` that takes ready pipelines, knows the metrics of this package by name
    without a connection, and takes the numbers of the model's classes where no `label_mapping` is given.

        ImageClassification().compute(model_or_pipeline=pipeline, data=dataset, metric="accuracy")
    """

    label2id: dict[str, int] | None = None

    def prepare_pipeline(self, model_or_pipeline: Any, *args: Any, **options: Any) -> Any:
        """A pipeline as it is; else the library makes one.

        Raises:
            ValueError: it is for another task.
        """
        if getattr(model_or_pipeline, "task", None) is not None:
            pipe = model_or_pipeline
            if pipe.task != self.task:
                raise ValueError(f"a pipeline for {pipe.task} is given, allowed is one for {self.task}")
        else:
            pipe = super().prepare_pipeline(model_or_pipeline, *args, **options)
        self.label2id = {name: int(number) for name, number in pipe.model.config.label2id.items()}
        return pipe

    def prepare_metric(self, metric: Any) -> Any:
        """A metric of this package by its name, from its file."""
        if isinstance(metric, str) and (METRICS / metric).is_dir():
            metric = evaluate.load(str(METRICS / metric), keep_in_memory=True)
        return super().prepare_metric(metric)

    def predictions_processor(self, predictions: Any, label_mapping: dict[str, int] | None) -> dict[str, Any]:
        """The best class of each image, as its number."""
        return super().predictions_processor(predictions, label_mapping or self.label2id)
