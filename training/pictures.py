import numpy as np


def captions(target, classes):
    return ["x"] * len(target)


def batch_picture(images, texts):
    return np.zeros((64, 64, 3), np.uint8)


def confusion_picture(counts, classes):
    return np.zeros((64, 64, 3), np.uint8)
