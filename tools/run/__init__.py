"""What train.py is made of, beside the data and the model: settings, data, logging, the run's folder, checkpoints."""
