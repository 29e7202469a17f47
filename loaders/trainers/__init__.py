"""What each trainer does with a prepared directory: facts, one file a trainer."""
