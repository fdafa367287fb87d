"""From raw footage to a training table: cut, score, caption, filter, export. See docs/data.md."""
