"""Files of models: checkpoints, journalled writers, artifacts and their manifests, sources."""
