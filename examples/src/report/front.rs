//! What no other point beats.

/// The points that no other is better than in one way and as good in the other: of those as far to the
/// left the highest, of those as high the leftmost, one of equals. Their indices, from left to right.
pub(super) fn front(points: &[(f64, f64)]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|&a, &b| {
        let ((ax, ay), (bx, by)) = (points[a], points[b]);
        ax.total_cmp(&bx).then(by.total_cmp(&ay))
    });
    let mut highest = f64::NEG_INFINITY;
    order.retain(|&index| {
        let is_higher = points[index].1 > highest;
        highest = highest.max(points[index].1);
        is_higher
    });
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beaten_is_left_out() {
        let points = [(0.0, 0.0), (0.4, 0.6), (0.2, 0.5), (0.3, 0.5), (0.2, 0.4), (0.9, 0.6)];
        assert_eq!(front(&points), [0, 2, 1]);
        assert_eq!(front(&[(0.5, 0.5), (0.5, 0.5)]), [0]);
        assert!(front(&[]).is_empty());
    }
}
