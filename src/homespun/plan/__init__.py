"""What a device executes: ONNX graphs plus a manifest. Data, never code.

`manifest` says what there is, `package` reads, writes and signs it, `operators` decides what it may
do, `features` turns examples into batches, `engine` and `run` execute it, `initial` makes the first
checkpoint, and `build` (the only part that needs PyTorch) makes a plan from an ordinary module.
"""
