"""From ids to ids: a checkpoint is loaded and continues texts."""
