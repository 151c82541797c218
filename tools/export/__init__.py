"""The `export` command: writes a trained network to an ONNX or torch.export file. Its command line is `cli.py`."""
