"""The kinds of image collections that `shards convert` reads. README.md explains how to add another one."""
