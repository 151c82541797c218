"""From bytes on storage to a batch on the device. Begin with `build.py`: `build_loader(config, split, ...)`."""
