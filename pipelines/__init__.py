"""Turns bytes on storage into batches on the device. Start at `build.py`: `build_loader(config, spec)`."""
