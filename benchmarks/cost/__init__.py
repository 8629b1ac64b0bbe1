"""What mpjax costs in time and memory, against bare code or without the part."""
