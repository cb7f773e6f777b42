package htmlreport

// room is how full the disk is and what it still takes.
type room struct {
	Size, Layers, Other, Free int64
	// Compressed is how many bytes more, as a registry counts them, would fit, if they
	// unpack to Factor times as much as those that are there do. 0 if there are none.
	Compressed int64
	Factor     float64
	// Largest is the row of the image with the most layers of its own, and Times how many
	// more like it fit. Nil if none has any.
	Largest *imageRow
	Times   int
}

func (v *view) room(d Disk, blobs bool) *room {
	r := &room{Size: d.Size, Layers: v.Size, Free: d.Free, Other: max(0, d.Size-d.Free-v.Size)}
	if v.Compressed > 0 && v.Size > 0 {
		taken := v.Size
		if blobs {
			taken += v.Compressed
		}
		r.Factor = float64(taken) / float64(v.Compressed)
		r.Compressed = int64(float64(d.Free) / r.Factor)
	}
	for i := range v.Images {
		if img := &v.Images[i]; img.Own > 0 && (r.Largest == nil || img.Own > r.Largest.Own) {
			r.Largest = img
		}
	}
	if r.Largest != nil {
		each := r.Largest.Own
		if blobs && v.Size > 0 {
			each += int64(float64(each) * float64(v.Compressed) / float64(v.Size))
		}
		r.Times = int(d.Free / each)
	}
	return r
}

// Percent is a part of the disk.
func (r *room) Percent(n int64) float64 {
	if r.Size <= 0 {
		return 0
	}
	return float64(1000*n/r.Size) / 10
}
