"""What is known of a step on the host before it runs, and how that gets to the device."""
