"""The path of a batch, from a set's name to uint8 images on the device:

sets/             a name -> rows of a training and an evaluation split: Hub and folders, columns, the subset rule,
                  and the sets that are computed here (digits, glyphs, fractals)
rows/             row numbers -> encoded images and labels: tables on disk, parquet shards in pieces, retries
order.py          step, process -> the indices of each micro-batch: training, evaluation, streams
preprocessing.py  what is done to an evaluation image; read from and written to an image processor's file
decode.py         encoded bytes -> uint8 pixels
cache.py          a split -> all its pixels, decoded once; resize.py brings them to the model's input
batches.py        indices -> uint8 micro-batches on the host; workers.py are the processes that decode
device.py         micro-batches -> the device, ahead of time
augment/          on the device, by the key of each sample: crops, policies, operations, erasing, mixing
feed.py           chooses the way and is all that a run calls; faults.py and starved.py say what was wrong with it
randomness.py     what is drawn for a sample: a hash of (seed, visit, index); copy/ is `vit-hf data prepare`
"""

from vit_hf.front import front

__getattr__ = front(
    __name__,
    {
        "augment.pipeline": "AugmentSettings make_augment normaliser",
        "faults": "DataReport",
        "feed": "LoadingSettings eval_batches fit_preprocessing train_batches",
        "order": "StepPlan",
        "preprocessing": "PreprocessingSettings own_preprocessing",
        "processes": "Processes",
        "sets.draws": "few_shot",
        "sets.load": "SetSettings load_splits",
        "sets.subset": "identity_of",
        "starved": "StarvedNote",
    },
)
