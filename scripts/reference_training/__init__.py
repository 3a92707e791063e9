"""The parts of train_reference_model.py, one stage per file."""
