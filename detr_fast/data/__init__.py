"""From annotated image files to batches: reading, checking, augmenting, padding."""
