"""The path of a batch, from a set's name to uint8 images on the device:

sets/             a name -> rows of a training and an evaluation split: Hub and folders, columns, the subset rule,
                  and the sets that are computed here (digits, glyphs, fractals)
rows/             rows by index -> encoded images and labels: tables on disk, parquet shards in pieces, retries
order.py          step, process -> the indices of each micro-batch: training, evaluation, streams
preprocessing.py  what is done to an evaluation image; read from and written to an image processor's file
decode.py         encoded bytes -> uint8 pixels of one size
cache.py          sets whose pixels are kept decoded (cache_folder.py: what lies there)
batches.py        indices -> uint8 micro-batches on the host
device.py         micro-batches -> the device, ahead of time; resize.py makes them the model's input there
augment/          on the device, by the key of each sample: crops, policies, operations, erasing, mixing
feed.py           chooses the way and is all that a run calls; faults.py reports what went wrong on it
randomness.py     what is drawn for a sample: a hash of (seed, visit, index); copy/ is `vit-hf data prepare`
"""
