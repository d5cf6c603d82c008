"""The engine that moves the mouth of a filmed or pictured face with MuseTalk."""
