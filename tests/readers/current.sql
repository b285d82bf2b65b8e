-- The images as they are now: the newest row of each that is not deleted. Superseded rows stay in
-- the table until compaction takes them away. DuckDB; other SQL has no `EXCLUDE`:
-- name the columns instead.
CREATE VIEW current_images AS
SELECT * EXCLUDE (place) FROM (
    SELECT *, row_number() OVER (
        PARTITION BY image_id ORDER BY sequence DESC, deleted DESC, embedded_at DESC
    ) AS place FROM images
) WHERE place = 1 AND NOT deleted;
