"""What can be known of a job before it trains, each fault with what to change."""
