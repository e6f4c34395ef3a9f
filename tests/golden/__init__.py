"""Files that releases wrote, and tests that every later version opens, resumes and imports them with the same meaning."""
